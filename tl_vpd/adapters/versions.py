"""What the installed TransformerLens has: 2.x and 3.x ``HookedTransformer``, 3.x and 4.x ``TransformerBridge``.

The rest of the package imports names that moved between versions from this module.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint

try:  # 4.x raises ImportError even for ``hasattr``
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:
    HookedTransformer = HookedTransformerConfig = None  # type: ignore[assignment, misc]

try:
    from transformer_lens import HookedRootModule
except ImportError:  # 2.x
    from transformer_lens.hook_points import HookedRootModule  # type: ignore[no-redef]

try:
    from transformer_lens.utilities import get_act_name, get_attention_mask, tokenize_and_concatenate
except ImportError:  # 2.x
    from transformer_lens.utils import get_act_name, get_attention_mask, tokenize_and_concatenate

__all__ = [
    "HookPoint",
    "HookedRootModule",
    "HookedTransformer",
    "HookedTransformerConfig",
    "get_act_name",
    "get_attention_mask",
    "is_bridge",
    "is_hooked_transformer",
    "tokenize_and_concatenate",
    "transformer_bridge",
    "transformer_lens_version",
]


def transformer_lens_version() -> tuple[int, ...]:
    """The installed version as numbers, ``(3, 9, 0)``."""
    return tuple(int(part) for part in version("transformer_lens").split(".")[:3] if part.isdigit())


def is_hooked_transformer(model: nn.Module) -> bool:
    """Whether the model is a HookedTransformer."""
    return HookedTransformer is not None and isinstance(model, HookedTransformer)


def is_bridge(model: nn.Module) -> bool:
    """Whether the model is a TransformerBridge (compared by name: importing the class takes seconds in some versions)."""
    return any(
        c.__name__ == "TransformerBridge" and c.__module__.startswith("transformer_lens") for c in type(model).__mro__
    )


def transformer_bridge() -> Any:
    """The class TransformerBridge; raises ImportError where the installed TransformerLens has none."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ImportError(
            f"TransformerLens {version('transformer_lens')} has no TransformerBridge: install 3.0 or later."
        ) from error
    return TransformerBridge
