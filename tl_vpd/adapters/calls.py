"""Calls of a model's ``forward``: their arguments, and what a call leaves out."""

from __future__ import annotations

import copy
import inspect
from functools import cached_property
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from tl_vpd.adapters.taps import Unsupported

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class Calls:
    """What an ``Adapter`` knows of the calls of a model."""

    model: Any
    return_types = True
    """Whether the model's ``forward`` takes ``return_type``."""
    kv_cache_argument: str | None = None
    """The argument of ``forward`` that is a KV cache (None: there is none)."""

    @cached_property
    def _parameters(self) -> list[str]:
        """The positional parameters of ``forward``; what a subclass passes on as ``*arguments`` is the class's above it."""
        names: list[str] = []
        for cls in type(self.model).__mro__:
            if "forward" in cls.__dict__:
                parameters = list(inspect.signature(cls.__dict__["forward"]).parameters.values())[1:]
                names += [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][
                    len(names) :
                ]
                if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
                    break
        return names

    def by_name(self, arguments: Arguments, keywords: Keywords) -> dict[str, Any]:
        """The arguments of a call by name."""
        return {**dict(zip(self._parameters, arguments, strict=False)), **keywords}

    def call(self, arguments: Arguments, keywords: Keywords, return_type: str | None) -> Any:
        """Runs the model's ``forward`` on the same arguments with another ``return_type``."""
        if not self.return_types:
            return self.model.forward(*arguments, **keywords)
        arguments, keywords = self.with_argument(arguments, keywords, "return_type", return_type)
        return self.model.forward(*arguments, **keywords)

    def with_argument(
        self, arguments: Arguments, keywords: Keywords, name: str, value: Any
    ) -> tuple[Arguments, Keywords]:
        """The arguments of a call with another value for one of them."""
        at = self._parameters.index(name) if name in self._parameters else len(arguments)
        if at < len(arguments):
            return (*arguments[:at], value, *arguments[at + 1 :]), {k: v for k, v in keywords.items() if k != name}
        return arguments, {**keywords, name: value}

    def run(self, tokens: Tensor, token_mask: Bool[Tensor, "batch pos"] | None) -> Tensor:
        """Logits of the model on tokens; ``token_mask`` is False at padding."""
        return self.model(
            tokens, return_type="logits", attention_mask=None if token_mask is None else token_mask.long()
        )

    def truncation(self, arguments: Arguments, keywords: Keywords) -> str | None:
        """The argument that makes a call skip blocks, if any."""
        return None

    def completed(self, arguments: Arguments, keywords: Keywords) -> bool:
        """Whether the call that has just ended went through every block."""
        return self.truncation(arguments, keywords) is None

    def kv_cache(self, arguments: Arguments, keywords: Keywords) -> Any:
        """The KV cache passed to a call, if any."""
        return self.by_name(arguments, keywords).get(self.kv_cache_argument or "")

    def with_kv_cache(self, arguments: Arguments, keywords: Keywords, cache: Any) -> tuple[Arguments, Keywords]:
        """The arguments of a call with another KV cache."""
        assert self.kv_cache_argument is not None
        return self.with_argument(arguments, keywords, self.kv_cache_argument, cache)

    def makes_kv_cache(self, arguments: Arguments, keywords: Keywords) -> bool:
        """Whether a call without a KV cache makes one."""
        return False

    def made_kv_cache(self, output: Any) -> Any:
        """The KV cache that the last call has made, from its output (None: it is unknown)."""
        return None

    def empty_kv_cache(self, like: Any) -> Any:
        """A KV cache without tokens, from an empty one for the same rows (None: the call makes it)."""
        return copy.deepcopy(like)

    def kv_cache_length(self, cache: Any) -> int:
        """Tokens in a KV cache; raises Unsupported where the class of model has none that is known."""
        raise Unsupported(
            f"A {type(self.model).__name__} has no KV cache that this package knows: call it without one."
        )

    def kv_cache_frozen(self, cache: Any) -> bool:
        """Whether calls leave a KV cache as it is."""
        return False
