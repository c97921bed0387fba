"""Sites: the weight matrices that can be decomposed, and the names of their subcomponents.

A site is one weight matrix ``W [d_in, d_out]`` in the orientation ``y = x @ W + b``. It bears TransformerLens's name of the
weight, ``blocks.1.attn.W_Q``; heads are flattened head-major, so ``d_out = n_heads * d_head`` for Q, K, V and
``d_in = n_heads * d_head`` for O. A subcomponent is ``site:index``.

    >>> Subcomponent.parse("blocks.1.attn.W_Q:316")
    Subcomponent(site='blocks.1.attn.W_Q', index=316)
    >>> select(["blocks.*.attn.W_Q"], ["blocks.0.attn.W_Q", "blocks.0.mlp.W_in"])
    ['blocks.0.attn.W_Q']

``tl_vpd.adapters`` knows where a site's input and output are in a model.
"""

from __future__ import annotations

import difflib
import itertools
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from jaxtyping import Shaped
from torch import Tensor

SHORT = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o", "W_in": "in", "W_gate": "gate", "W_out": "out"}
"""TransformerLens's name of a weight -> the short name in ``blocks.{i}.hook_{site}_{what}``."""

_WEIGHTS = {short: weight for weight, short in SHORT.items()}
_WEIGHTS |= dict.fromkeys(("z", "result", "attn_out"), "W_O")
_WEIGHTS |= dict.fromkeys(("pre", "pre_linear", "up"), "W_in")
_WEIGHTS |= dict.fromkeys(("post", "mlp_out", "down"), "W_out")
"""Other names of a weight, without what ``_AFFIXES`` matches, -> TransformerLens's."""
_AFFIXES = re.compile(r"^hook_|_proj$|_component_acts$|_ci$|_delta_mask$|_mask$")
_BLOCK_SITE = re.compile(r"(blocks\.\d+)\.(?:attn|mlp)\.(W_[QKVO]|W_in|W_gate|W_out)")
T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """One decomposable weight matrix.

    Attributes:
        name: TransformerLens's of the weight; of an ``nn.Linear`` in a custom model, the module's path (``encoder.linear1``).
        d_in: width of the input.
        d_out: width of the output.
        n_heads: heads of ``d_out`` (Q, K, V) or of ``d_in`` (O); None for other weights.
        d_head: width of a head; None for other weights.

    Raises:
        TypeError: the name is not a string, or a size not an integer.
        ValueError: a size is below 1.
    """

    name: str
    d_in: int
    d_out: int
    n_heads: int | None = None
    d_head: int | None = None

    def __post_init__(self) -> None:
        _check_name("The name of a site", self.name)
        for field in ("d_in", "d_out", "n_heads", "d_head"):
            size = getattr(self, field)
            if size is not None or field in ("d_in", "d_out"):
                object.__setattr__(self, field, _whole(field, size, 1))

    @property
    def layer(self) -> int | None:
        """The index of the block the site is in (None: its path has no index)."""
        indices = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", self.name)
        return int(indices[0]) if indices else None

    @property
    def short(self) -> str:
        """``q``, ``k``, ``v``, ``o``, ``in``, ``gate`` or ``out``; outside transformer blocks the last part of the name."""
        block = _BLOCK_SITE.fullmatch(self.name)
        return SHORT[block[2]] if block else self.name.rpartition(".")[2]

    @property
    def home(self) -> str:
        """Path of the module that carries the site's HookPoints: the block, or the ``nn.Linear`` itself."""
        block = _BLOCK_SITE.fullmatch(self.name)
        return block[1] if block else self.name

    def hook_name(self, what: str) -> str:
        """The full name of the site's HookPoint for ``what`` (``component_acts``, ``ci``, ``mask``, ``delta_mask``)."""
        if not isinstance(what, str):
            raise TypeError(f"what is a {type(what).__name__}: give a kind of hook, such as 'ci'.")
        # Not beside an nn.Linear: an nn.Sequential would run them.
        prefix = "" if self.home == self.name else f"{self.short}_"
        return f"{self.home}.hook_{prefix}{what}"

    @property
    def rank(self) -> int:
        """The largest rank the matrix can have."""
        return min(self.d_in, self.d_out)


@dataclass(frozen=True, order=True)
class Subcomponent:
    """A subcomponent's address.

    Attributes:
        site: the name of its site.
        index: 0 or more.

    Raises:
        TypeError: the site is not a string, or the index not an integer.
        ValueError: the index is negative.
    """

    site: str
    index: int

    def __post_init__(self) -> None:
        _check_name("The site of a subcomponent", self.site)
        object.__setattr__(self, "index", _whole("index", self.index, 0))

    @classmethod
    def parse(cls, text: str | Subcomponent) -> Subcomponent:
        """Reads ``site:index``.

        Args:
            text: an address, or a subcomponent, which is returned.

        Raises:
            TypeError: it is something else.
            ValueError: it is not written like that.
        """
        if isinstance(text, Subcomponent):
            return text
        if not isinstance(text, str):
            raise TypeError(
                f"The address of a subcomponent is a {type(text).__name__}: write 'site:index', such as 'blocks.1.attn.W_Q:316'."
            )
        site, colon, index = text.rpartition(":")
        if not colon or not index.isdecimal() or len(index) > 18:
            raise ValueError(
                f"{str(text)!r:.80} is not a subcomponent: write 'site:index', such as 'blocks.1.attn.W_Q:316'."
            )
        return cls(site, int(index))

    def __str__(self) -> str:
        return f"{self.site}:{self.index}"


def _check_name(what: str, name: object) -> None:
    """Raises TypeError unless a name is a string."""
    if not isinstance(name, str):
        raise TypeError(f"{what} is a {type(name).__name__}: give a string.")


def _whole(what: str, value: Any, least: int) -> int:
    """An integer (NumPy's too) of at least ``least``; ``tl_vpd.checks`` stands above this module."""
    try:
        truth = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
        number = None if truth else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"The {what} is a {type(value).__name__}: give an integer.")
    if not least <= number < 1 << 63:
        came = number if abs(number) < 1 << 63 else "an integer beyond 64 bits"
        raise ValueError(f"{what}={came}: give an integer of at least {least}.")
    return number


def select(patterns: str | Iterable[str] | None, names: Iterable[str]) -> list[str]:
    """The names matched by any of the shell-style patterns, in the order of ``names``.

    Args:
        patterns: one or several (None: every name).
        names: of all sites.

    Raises:
        TypeError: the patterns are not strings.
        ValueError: there are no patterns.
        KeyError: a pattern matches nothing; the message has the nearest name.
    """
    names = list(names)
    if patterns is None:
        return names
    try:
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    except TypeError as error:
        raise TypeError(
            f"The sites are a {type(patterns).__name__}: give patterns such as 'blocks.1.*', or None for all."
        ) from error
    if not patterns:
        raise ValueError("The list of sites is empty: give one pattern or more, such as 'blocks.1.*', or None for all.")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"A pattern of sites is a {type(pattern).__name__}: give a string such as 'blocks.1.*'.")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise KeyError(
                f"No site matches {pattern!r:.80}{nearest(pattern, names)}. The sites are: {', '.join(names)}."
            )
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]


def by_pattern(values: Mapping[str, T], names: Sequence[str], *, what: str) -> dict[str, T]:
    """Resolves ``{pattern: value}`` to ``{name: value}``; the more specific pattern wins.

    A name itself is the most specific; of two patterns, the one that matches fewer of the names. Equally specific patterns must
    agree.

    >>> by_pattern({"*.W_[QK]": 64, "*": 256}, ["b.W_Q", "b.W_K", "b.W_O"], what="C")
    {'b.W_Q': 64, 'b.W_K': 64, 'b.W_O': 256}

    Args:
        values: by shell-style pattern.
        names: of all sites.
        what: the values are, for messages.

    Raises:
        KeyError: a pattern matches nothing, or no pattern matches a name.
        ValueError: equally specific patterns give one name different values.
    """
    matches = {pattern: select(pattern, names) for pattern in values}
    result: dict[str, T] = {}
    for name in names:
        patterns = sorted((p for p in values if name in matches[p]), key=lambda p: (p != name, len(matches[p])))
        if not patterns:
            continue
        first = patterns[0]
        for other in patterns[1:]:
            if first != name and len(matches[other]) == len(matches[first]) and values[other] != values[first]:
                raise ValueError(
                    f"{what} of {name} is ambiguous: {first!r} says {values[first]}, {other!r} says {values[other]}, and each "
                    f"matches {len(matches[first])} sites. Name the site itself, or make one pattern narrower."
                )
        result[name] = values[first]
    missing = [name for name in names if name not in result]
    if missing:
        raise KeyError(f"There is no {what} for {', '.join(missing)}; the patterns are: {', '.join(values)}.")
    return result


def nearest(name: object, names: Iterable[object]) -> str:
    """``" (did you mean 'x'?)"``, or nothing if no name is near.

    A name that differs in case alone is the nearest; the name of a hook or of a Hugging Face layer means the weight behind it.
    """
    if not isinstance(name, str):
        return ""
    texts = [other for other in names if isinstance(other, str)]
    path, dot, last = name[:200].rpartition(".")
    weight = _WEIGHTS.get(_AFFIXES.sub("", last.lower()))
    name = f"{path}{dot}{weight}" if weight and any(n.endswith(weight) for n in texts) else name[:200]
    same = [n for n in texts if n.lower() == name.lower()]
    close = same or difflib.get_close_matches(name, texts, n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""


class BySite(Mapping[str, Tensor]):
    """Tensors by site."""

    by_site: Mapping[str, Tensor]

    def __getitem__(self, site: str) -> Tensor:
        if not isinstance(site, str) or site not in self.by_site:
            came = f"{site!r:.80}" if isinstance(site, str) else f"A {type(site).__name__}"
            raise KeyError(f"{came} is not among these sites{nearest(site, self.by_site)}: {', '.join(self.by_site)}.")
        return self.by_site[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_site)

    def __len__(self) -> int:
        return len(self.by_site)


class ConcatenatedAxis:
    """Where each site's subcomponents lie on one concatenated axis of ``C_total = sum of C`` entries.

    Importances, sources and masks of all sites are one tensor ``[..., C_total]``, which costs one elementwise pass instead of one
    per site; ``split_sites`` gives views.

    Args:
        counts: number of subcomponents C by site.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = dict(counts)
        self.names = list(self.counts)
        self.total = sum(self.counts.values())
        ends = itertools.accumulate(self.counts.values())
        self.slices = {name: slice(end - self.counts[name], end) for name, end in zip(self.counts, ends, strict=True)}

    def __repr__(self) -> str:
        return f"ConcatenatedAxis({len(self.names)} sites, {self.total} subcomponents)"

    def split_sites(self, concatenated: Shaped[Tensor, "*batch C_total"]) -> dict[str, Shaped[Tensor, "*batch _"]]:
        """Views of the concatenated tensor, by site."""
        return dict(zip(self.names, concatenated.split(list(self.counts.values()), dim=-1), strict=True))

    def subcomponents(self) -> Iterator[Subcomponent]:
        """All subcomponents in concatenated order."""
        return (Subcomponent(name, index) for name, count in self.counts.items() for index in range(count))

    def at(self, position: int) -> Subcomponent:
        """The subcomponent at a concatenated position; raises IndexError if there is none."""
        for name, columns in self.slices.items():
            if columns.start <= position < columns.stop:
                return Subcomponent(name, position - columns.start)
        raise IndexError(f"Position {position} is outside the {self.total} subcomponents.")
