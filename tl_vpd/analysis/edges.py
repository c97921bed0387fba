"""Edges of circuits: what a head, an MLP or the logits read from an earlier head, MLP or the embedding.

An edge is written ``source->target[<q|k|v>][@position]``, as EAP-IG's files write it:

==========  =========================================================  ======================
``input``   the residual stream that enters the first block            a source
``a1.h3``   head 3 of block 1 (its result, without ``b_O``)            a source and a target
``m0``      the MLP of block 0                                         a source and a target
``logits``  the last residual stream, before the final norm            a target
==========  =========================================================  ======================

    >>> Edge.parse("a0.h1->a1.h3<q>@5")
    Edge(source='a0.h1', target='a1.h3', reads='q', pos=5)
    >>> [str(edge) for edge in Edge.parse("m0->a1.h3").alternatives()]      # a head reads by queries, keys and values
    ['m0->a1.h3<q>', 'm0->a1.h3<k>', 'm0->a1.h3<v>']
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from tl_vpd.checks import choice, integer, shown, text_of

_SOURCE = r"input|a\d+\.h\d+|m\d+"
_TARGET = r"logits|a\d+\.h\d+|m\d+"
_EDGE = re.compile(rf"(?P<source>{_SOURCE})->(?P<target>{_TARGET})(?:<(?P<reads>[qkv])>)?(?:@(?P<pos>\d+))?", re.ASCII)
READS = ("q", "k", "v")


@dataclass(frozen=True)
class Edge:
    """An edge's address.

    Attributes:
        source: whose output is read.
        target: what reads it.
        reads: whether a head reads it for its queries, keys or values (None: for all three, or the target is not a head).
        pos: the position at which the target reads (None: every position).

    Raises:
        TypeError: a value is of another type.
        ValueError: a value names no node, the position is negative, or something that is not a head is to read queries.
    """

    source: str
    target: str
    reads: str | None = None
    pos: int | None = None

    def __post_init__(self) -> None:
        for name, pattern in (("source", _SOURCE), ("target", _TARGET)):
            if not re.fullmatch(pattern, text_of(name, getattr(self, name)), re.ASCII):
                allowed = "'input', 'a0.h3' or 'm0'" if name == "source" else "'a1.h3', 'm1' or 'logits'"
                raise ValueError(f"{name}={shown(getattr(self, name))}: write {allowed}.")
        if self.reads is not None:
            choice("reads", self.reads, READS)
            if not self.target.startswith("a"):
                raise ValueError(f"reads={self.reads!r}: only heads read queries, keys and values, not {self.target}.")
        if self.pos is not None:
            object.__setattr__(self, "pos", integer("pos", self.pos, minimum=0))

    @classmethod
    def parse(cls, text: str | Edge) -> Edge:
        """Reads ``source->target[<q|k|v>][@position]``; raises ValueError on other texts, TypeError on anything else."""
        if isinstance(text, Edge):
            return text
        if not isinstance(text, str):
            raise TypeError(f"{shown(text)} is a {type(text).__name__}: write an edge as 'a0.h1->a1.h3<q>'.")
        match = _EDGE.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{shown(text)} is not an edge: write 'source->target', such as 'input->m0', 'a0.h1->a1.h3<q>' or 'm1->logits'."
            )
        pos = match["pos"]
        return cls(match["source"], match["target"], match["reads"], None if pos is None else int(pos))

    def alternatives(self) -> tuple[Edge, ...]:
        """The edges with one reader each that this one stands for: three where a head's ``reads`` is None."""
        if self.reads is None and self.target.startswith("a"):
            return tuple(replace(self, reads=reads) for reads in READS)
        return (self,)

    def __str__(self) -> str:
        reads = "" if self.reads is None else f"<{self.reads}>"
        return f"{self.source}->{self.target}{reads}" + ("" if self.pos is None else f"@{self.pos}")


def is_edge(address: Any) -> bool:
    """Whether something that addresses a part of a circuit is an edge."""
    return isinstance(address, Edge) or (isinstance(address, str) and "->" in address)
