"""V, U and Γ of a set of sites, with what identifies the weights they belong to: the numbers of a decomposition.

This module does not know models or hooks; ``tl_vpd.Decomposition`` adds the methods that put these numbers on a model.

On disk (``tl_vpd.components.storage``), keys of the tensors are ``V/{site}``, ``U/{site}`` and ``gamma/{parameter}``. The
config (``tl_vpd.importance.stored_config``) has sites and shapes, Γ's config and fingerprints of the target's weights; a record
(training config, metrics, versions) is beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from tl_vpd.components.components import Components
from tl_vpd.components.fingerprint import Fingerprint
from tl_vpd.components.storage import check_tensors, check_values, fill, float_dtype, open_folder, write_folder
from tl_vpd.files.versions import library_versions
from tl_vpd.importance.build import build
from tl_vpd.importance.config import GammaConfig
from tl_vpd.importance.inputs import inputs_of
from tl_vpd.importance.squash import lower_leaky
from tl_vpd.importance.stored_config import StoredConfig
from tl_vpd.importance.transformer import GammaCache
from tl_vpd.site import ConcatenatedAxis, Site, Subcomponent, nearest

D = TypeVar("D", bound="DecomposedWeights")


class DecomposedWeights(nn.Module):
    """V, U and Γ for a set of sites of one target model.

    Args:
        sites: the decomposed weights.
        counts: number of subcomponents C by site.
        gamma: which Γ (its width must be resolved).
        fingerprints: of the target's weights by site, compared with a model's before it is used.
        record: where it comes from: ``training`` (config), ``metrics``, ``target`` (name and settings), ``versions``.
        seed: of the initial values.

    Raises:
        ValueError: a site's C is below 1, or Γ's widths do not fit together.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        counts: Mapping[str, int],
        gamma: GammaConfig,
        *,
        fingerprints: Mapping[str, Fingerprint],
        record: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.components = Components(sites, counts, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs' generators too
            self.gamma = build(gamma, sites, self.counts)
        self.gamma_config = gamma
        self.gamma_inputs = tuple(inputs_of(gamma.reads, sites))
        """Names of what Γ reads: the sites, or ``blocks.{i}.hook_resid_pre``."""
        self.fingerprints = dict(fingerprints)
        self.record = dict(record or {})

    # -- what it consists of -----------------------------------------------------------------------------------------

    @property
    def sites(self) -> dict[str, Site]:
        """The decomposed sites by name, in the order of the model's forward pass."""
        return self.components.sites

    @property
    def site_axis(self) -> ConcatenatedAxis:
        """Where each site lies on the concatenated axis."""
        return self.components.site_axis

    @property
    def counts(self) -> dict[str, int]:
        """Number of subcomponents C by site."""
        return self.site_axis.counts

    @property
    def V(self) -> Mapping[str, Tensor]:
        """Read directions ``[d_in, C]`` by site."""
        return self.components.V

    @property
    def U(self) -> Mapping[str, Tensor]:
        """Write directions ``[C, d_out]`` by site."""
        return self.components.U

    @property
    def device(self) -> torch.device:
        """Where the decomposition's tensors are."""
        return next(self.parameters()).device

    def __repr__(self) -> str:
        rows = "".join(f"\n  {s.name} [{s.d_in} -> {s.d_out}] C={self.counts[s.name]}" for s in self.sites.values())
        return (
            f"{type(self).__name__}({len(self.sites)} sites, {self.site_axis.total} subcomponents, "
            f"{self.gamma_config.kind}){rows}"
        )

    def subcomponent(self, address: str | Subcomponent) -> Subcomponent:
        """Reads ``site:index``; raises KeyError (with the nearest site) or IndexError if it is not in this decomposition."""
        parsed = Subcomponent.parse(address)
        if parsed.site not in self.sites:
            raise KeyError(f"{parsed.site!r} is not a decomposed site{nearest(parsed.site, self.sites)}.")
        if not 0 <= parsed.index < self.counts[parsed.site]:
            raise IndexError(
                f"{parsed} does not exist: {parsed.site} has {self.counts[parsed.site]} subcomponents, 0 to "
                f"{self.counts[parsed.site] - 1}."
            )
        return parsed

    # -- Γ -----------------------------------------------------------------------------------------------------------

    def pre_sigmoid(
        self,
        inputs: Mapping[str, Float[Tensor, "batch *pos _"]],
        token_mask: Bool[Tensor, "batch pos_of_keys"] | None = None,
        cache: GammaCache | None = None,
    ) -> Float[Tensor, "batch *pos C_total"]:
        """Γ's values before squashing, concatenated over sites.

        Args:
            inputs: what Γ reads on a clean forward, by name (``gamma_inputs``; others are left aside), which is detached; without
                positions, ``[batch, d_in]`` is a sequence of one.
            token_mask: False at padding (None: no padding); with a cache, also of the cached tokens before these.
            cache: what Γ has kept of the tokens before these, which is extended (None: these are all).

        Raises:
            KeyError: something that Γ reads is not among the inputs.
            ValueError: only some inputs have positions, or they have other axes; or there is a cache and Γ is bidirectional.
        """
        if missing := [name for name in self.gamma_inputs if name not in inputs]:
            raise KeyError(
                f"The inputs lack {missing[0]}, which Γ reads: pass all that MaskedModel.clean gives on a model with this "
                "decomposition."
            )
        ranks = {x.ndim for x in inputs.values()}
        if len(ranks) > 1 or not ranks <= {2, 3}:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
            raise ValueError(
                f"The sites' inputs are {shapes}: Γ reads all sites of a token together, so they must all be [batch, pos, d_in] "
                "or all [batch, d_in]. Decompose the sites of one kind (VPDConfig(sites=...))."
            )
        if ranks == {2}:
            return self.pre_sigmoid(_with_positions(inputs), token_mask).squeeze(1)
        clean = {name: inputs[name].detach() for name in self.gamma_inputs}
        device = next(iter(clean.values())).device
        if device != self.device:
            # The model is on a GPU, the decomposition on the CPU: a copy of it goes there for the call.
            tensors = {f"weights.{name}": t.to(device) for name, t in self.state_dict(keep_vars=True).items()}
            return functional_call(_PreSigmoid(self), tensors, (inputs, token_mask, cache))
        if self.gamma.needs == "acts":
            clean = {name: self.components.acts(name, x) for name, x in clean.items()}
        elif len({id(inputs[name]) for name in self.gamma_inputs}) < len(clean):
            # Sites that share one input tensor still share it, so that Γ normalises it once.
            shared = {id(inputs[name]): x for name, x in clean.items()}
            clean = {name: shared[id(inputs[name])] for name in clean}
        return self.gamma(clean, token_mask) if cache is None else self.gamma(clean, token_mask, cache)

    def importances(
        self,
        inputs: Mapping[str, Float[Tensor, "batch *pos _"]],
        token_mask: Bool[Tensor, "batch pos_of_keys"] | None = None,
        cache: GammaCache | None = None,
    ) -> Float[Tensor, "batch *pos C_total"]:
        """Causal importances from every site's clean input, 0 at padding; arguments as for ``pre_sigmoid``."""
        z = self.pre_sigmoid(inputs, token_mask, cache)
        g = lower_leaky(z) if z.requires_grad else z.clamp_(0, 1)  # in place: z is large, and nobody else has it
        return g if token_mask is None else g * token_mask[:, -g.shape[1] :, None]

    # -- files -------------------------------------------------------------------------------------------------------

    def file_tensors(self) -> dict[str, Tensor]:
        """All tensors under the keys of the file."""
        tensors: dict[str, Tensor] = {}
        for name in self.sites:
            tensors[f"V/{name}"] = self.V[name]
            tensors[f"U/{name}"] = self.U[name]
        tensors.update({f"gamma/{name}": p for name, p in self.gamma.named_parameters()})
        return {key: t.detach() for key, t in tensors.items()}

    def write(self, folder: Path, *, dtype: torch.dtype | None = None) -> Path:
        """Writes the folder; ``dtype`` stores in another precision.

        Raises:
            OSError: the folder cannot be written, or belongs to something else.
            TypeError: the record is not data, or ``dtype`` is not a dtype.
            ValueError: the record or a tensor holds values that are NaN or infinite (in ``dtype``); nothing is written then.
        """
        config: dict[str, Any] = {
            "sites": [asdict(site) for site in self.sites.values()],
            "C": self.counts,
            "gamma": self.gamma_config.model_dump(),
            "fingerprints": {name: f.model_dump() for name, f in self.fingerprints.items()},
        }
        StoredConfig.of(config, "The decomposition")
        config["record"] = {"versions": library_versions(), **self.record}
        tensors = {}
        for key, tensor in self.file_tensors().items():
            tensors[key] = tensor.to("cpu", float_dtype(tensor.dtype if dtype is None else dtype)).contiguous()
            check_values(key, tensor, tensors[key])
        return write_folder(folder, config, tensors)

    @classmethod
    def read(cls: type[D], folder: Path, *, device: torch.device, dtype: torch.dtype) -> D:
        """Reads a folder straight to a device and dtype, tensor by tensor.

        Raises:
            FileNotFoundError: there is no such folder, or it is not a decomposition.
            TypeError: ``dtype`` is not a dtype.
            ValueError: a file is damaged, a key or shape is wrong, or values are too large for the dtype; the message says which.
        """
        dtype = float_dtype(dtype)
        with open_folder(folder) as (config, file):
            record = config.pop("record", None)
            stored = StoredConfig.of(config, f"The config of {folder}")
            stored.check_sizes(file)
            try:
                with torch.device("meta"):
                    weights = cls(
                        stored.as_sites(),
                        stored.C,
                        stored.gamma,
                        fingerprints=stored.fingerprints,
                        record=record if isinstance(record, dict) else {},
                    )
            except ValueError as error:
                raise ValueError(f"The config of {folder} is damaged: {error}") from error
            check_tensors(weights.file_tensors(), file)
            weights.to(dtype).to_empty(device=device)
            fill(weights.file_tensors(), file)
        return weights


class _PreSigmoid(nn.Module):
    """``DecomposedWeights.pre_sigmoid`` as a ``forward``."""

    def __init__(self, weights: DecomposedWeights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, inputs: Mapping[str, Tensor], token_mask: Tensor | None, cache: GammaCache | None) -> Tensor:
        return self.weights.pre_sigmoid(inputs, token_mask, cache)


def _with_positions(inputs: Mapping[str, Float[Tensor, "batch _"]]) -> dict[str, Float[Tensor, "batch 1 _"]]:
    """Inputs as sequences of one; shared tensors are still shared."""
    shared = {id(x): x.unsqueeze(1) for x in inputs.values()}
    return {name: shared[id(x)] for name, x in inputs.items()}
