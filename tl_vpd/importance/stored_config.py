"""The config of a decomposition on disk: what it must say, and that it fits the tensors, before anything is allocated.

>>> StoredConfig.of({"sites": [], "C": {}, "gamma": {}, "fingerprints": {}}, "config")
Traceback (most recent call last):
ValueError: config is damaged: sites=(): Tuple should have at least 1 item after validation, not 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from tl_vpd.checks import sentence_of
from tl_vpd.components.fingerprint import PROJECTIONS, Fingerprint
from tl_vpd.files.tensor_file import TensorFile
from tl_vpd.frozen import Frozen
from tl_vpd.importance.config import GammaConfig, Size, stored_gamma
from tl_vpd.site import Site


class StoredSite(Frozen):
    """A site; fields as ``tl_vpd.site.Site`` has them."""

    name: str = Field(min_length=1)
    d_in: Size
    d_out: Size
    n_heads: Size | None
    d_head: Size | None

    @model_validator(mode="after")
    def _heads_fill_a_side(self) -> StoredSite:
        heads = (self.n_heads, self.d_head)
        if heads != (None, None) and (None in heads or math.prod(heads) not in (self.d_in, self.d_out)):  # type: ignore[arg-type]
            raise ValueError(f"{heads[0]} heads of {heads[1]} are not {self.d_in} or {self.d_out} wide")
        return self


class StoredConfig(Frozen):
    """The config."""

    sites: tuple[StoredSite, ...] = Field(min_length=1)
    """In the order of the model's forward pass, which is that of Γ's inputs and outputs."""
    C: dict[str, Size]
    """Number of subcomponents by site."""
    gamma: GammaConfig
    fingerprints: dict[str, Fingerprint]
    """Of the target's weights by site."""

    @field_validator("gamma", mode="before")
    @classmethod
    def _of_any_version(cls, gamma: Any) -> Any:
        return stored_gamma(gamma) if isinstance(gamma, Mapping) else gamma

    @model_validator(mode="after")
    def _agree_about_sites(self) -> StoredConfig:
        names = Counter(site.name for site in self.sites)
        wrong = (
            {name for name, n in names.items() if n > 1} or names.keys() ^ self.C or names.keys() ^ self.fingerprints
        )
        if wrong:
            raise ValueError(f"sites, C and fingerprints disagree about {', '.join(sorted(wrong)[:3])}")
        for name, fingerprint in self.fingerprints.items():
            if len(fingerprint.projections) != PROJECTIONS or not math.isfinite(
                sum(fingerprint.projections, fingerprint.norm)
            ):
                raise ValueError(f"the fingerprint of {name} is not a finite norm with {PROJECTIONS} projections")
        return self

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str) -> StoredConfig:
        """The config from JSON's values.

        Args:
            config: from a file.
            name: of the file, for messages.

        Raises:
            ValueError: something is missing, too much, of a wrong type or out of range.
        """
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            raise ValueError(f"{name} is damaged: {sentence_of(error)}") from error
        except RecursionError as error:
            raise ValueError(f"{name} is damaged: it is nested too deeply.") from error

    def as_sites(self) -> list[Site]:
        """The sites."""
        return [Site(**site.model_dump()) for site in self.sites]

    def check_sizes(self, file: TensorFile) -> None:
        """Compares V, U and Γ's depth with the file's header, so that no module is built that the file cannot fill.

        Raises:
            ValueError: a matrix is missing or of another shape, or the file has fewer tensors of Γ than the config asks for.
        """
        for site in self.sites:
            C = self.C[site.name]
            for key, shape in ((f"V/{site.name}", (site.d_in, C)), (f"U/{site.name}", (C, site.d_out))):
                if file.shapes.get(key) != shape:
                    stored = file.shapes.get(key, "missing")
                    raise ValueError(f"{file.path}: {key} is {stored}, the config says {shape}.")
        chunk = {"shared_transformer": len(self.sites), "chunked_transformers": self.gamma.chunk}.get(self.gamma.kind)
        n = sum(key.startswith("gamma/") for key in file.shapes)
        if chunk and math.ceil(len(self.sites) / chunk) * self.gamma.n_blocks > n:
            raise ValueError(f"{file.path}: the config says n_blocks={self.gamma.n_blocks}, and Γ has {n} tensors.")
