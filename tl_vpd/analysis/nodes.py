"""Nodes of circuits: a subcomponent, or anything else a hook of TransformerLens sees, at a position or at all of them.

A node is written ``name[:index][@position]``: the name is a site's, or a hook's.

    >>> Node.parse("blocks.1.attn.W_Q:316@5")
    Node(name='blocks.1.attn.W_Q', index=316, pos=5)
    >>> str(Node("blocks.0.attn.hook_z", 3))        # head 3 at every position
    'blocks.0.attn.hook_z:3'
    >>> Node.parse("blocks.0.hook_mlp_out@4").index is None
    True
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tl_vpd.checks import integer, sequence, shown, text_of
from tl_vpd.site import Subcomponent

_NODE = re.compile(r"(?P<name>[^:@]+)(?::(?P<index>\d+))?(?:@(?P<pos>\d+))?")


@dataclass(frozen=True)
class Node:
    """A node's address.

    Attributes:
        name: a site (``blocks.1.attn.W_Q``), or a hook (``blocks.0.attn.hook_z``, ``blocks.0.hook_mlp_out``).
        index: the subcomponent, head or neuron (None: all of what the hook sees).
        pos: the position in the prompt (None: every position).

    Raises:
        TypeError: a value is of another type.
        ValueError: the index or the position is negative.
    """

    name: str
    index: int | None = None
    pos: int | None = None

    def __post_init__(self) -> None:
        text_of("name", self.name)
        for what in ("index", "pos"):
            if getattr(self, what) is not None:
                object.__setattr__(self, what, integer(what, getattr(self, what), minimum=0))

    @classmethod
    def parse(cls, text: str | Node | Subcomponent) -> Node:
        """Reads ``name[:index][@position]``; raises ValueError on other texts, TypeError on anything else."""
        if isinstance(text, Node):
            return text
        if isinstance(text, Subcomponent):
            return cls(text.site, text.index)
        if not isinstance(text, str):
            raise TypeError(f"{shown(text)} is a {type(text).__name__}: write a node as 'name[:index][@position]'.")
        match = _NODE.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{shown(text)} is not a node: write 'name[:index][@position]', such as 'blocks.1.attn.W_Q:316@5'."
            )
        index, pos = match["index"], match["pos"]
        return cls(match["name"], None if index is None else int(index), None if pos is None else int(pos))

    @property
    def subcomponent(self) -> Subcomponent:
        """The node without its position; raises ValueError where there is no index."""
        if self.index is None:
            raise ValueError(f"{self} does not name a single subcomponent: write '{self.name}:index'.")
        return Subcomponent(self.name, self.index)

    def __str__(self) -> str:
        index = "" if self.index is None else f":{self.index}"
        return f"{self.name}{index}" + ("" if self.pos is None else f"@{self.pos}")


def position_of(pos: Any, length: int) -> int:
    """A position of a prompt, counted from the start; raises TypeError unless it is one integer, IndexError beyond the prompt."""
    position = integer("pos", pos)
    if not -length <= position < length:
        raise IndexError(f"pos={position}: the prompt has positions {-length} to {length - 1}.")
    return position % length


def several(name: str, addresses: Any) -> list[Any]:
    """One address (of a subcomponent or node), or several in a list, as a list; raises ValueError for an empty one."""
    if isinstance(addresses, str | Subcomponent | Node):
        return [addresses]
    result = sequence(name, addresses)
    if not result:
        raise ValueError(f"{name} is empty: name at least one, such as 'blocks.0.mlp.W_in:3'.")
    return result
