"""Calls of a model's ``forward``: their arguments, and what a call leaves out."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

from jaxtyping import Bool
from torch import Tensor

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class Calls:
    """What an ``Adapter`` knows of the calls of a model."""

    model: Any
    return_types = True
    """Whether the model's ``forward`` takes ``return_type``."""

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
        at = self._parameters.index("return_type") if "return_type" in self._parameters else None
        if at is not None and len(arguments) > at:
            arguments = (*arguments[:at], return_type, *arguments[at + 1 :])
            return self.model.forward(*arguments, **{k: v for k, v in keywords.items() if k != "return_type"})
        return self.model.forward(*arguments, **{**keywords, "return_type": return_type})

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
        return None
