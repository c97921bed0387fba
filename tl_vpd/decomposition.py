"""A decomposition: components, Γ, the sites they belong to, and where it came from.

    >>> vpd = Decomposition.load("gpt2-vpd")                  # doctest: +SKIP
    >>> with vpd.attach(model) as attached:                   # doctest: +SKIP
    ...     logits, cache = model.run_with_cache(tokens)
    ...     cache["q_ci", 1]

Everything here is numerics and a description; what touches a model lives in ``tl_vpd.hooks`` and is imported where needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from tl_vpd.components import Components
from tl_vpd.fingerprint import Fingerprint
from tl_vpd.importance import GammaConfig, build
from tl_vpd.site import Packing, Site, Subcomponent, nearest

if TYPE_CHECKING:
    import pandas as pd

    from tl_vpd.hooks import Attached, CausalImportances, ComponentActs
    from tl_vpd.masking import Masks, SiteMask


class Decomposition(nn.Module):
    """V, U and Γ for a set of sites of one target model.

    Args:
        sites: the decomposed weights.
        counts: number of subcomponents C by site.
        gamma: which Γ (its width must be resolved).
        fingerprints: of the target's weights by site, compared on attach.
        record: what is known of its making: ``training`` (config), ``metrics``, ``target`` (name and settings), ``versions``.
        seed: initialisation is drawn from it.
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
            torch.manual_seed(seed)
            self.gamma = build(gamma, {s.name: s.d_in for s in sites}, self.counts)
        self.gamma_config = gamma
        self.fingerprints = dict(fingerprints)
        self.record = dict(record or {})

    # -- what it consists of ---------------------------------------------------------------------------------------

    @property
    def sites(self) -> dict[str, Site]:
        """The decomposed sites by name, in the order of the model's forward pass."""
        return self.components.sites

    @property
    def packing(self) -> Packing:
        """Where each site lies on the packed axis."""
        return self.components.packing

    @property
    def counts(self) -> dict[str, int]:
        """Number of subcomponents C by site."""
        return self.packing.counts

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
        return f"Decomposition({len(self.sites)} sites, {self.packing.total} subcomponents, {self.gamma_config.kind}){rows}"

    def subcomponent(self, address: str | Subcomponent) -> Subcomponent:
        """Reads ``site:index``; raises KeyError (with the nearest site) or IndexError if it is not in this decomposition."""
        found = Subcomponent.parse(address)
        if found.site not in self.sites:
            raise KeyError(f"{found.site!r} is not a decomposed site{nearest(found.site, self.sites)}.")
        if not 0 <= found.index < self.counts[found.site]:
            raise IndexError(
                f"{found} does not exist: {found.site} has {self.counts[found.site]} subcomponents, 0 to "
                f"{self.counts[found.site] - 1}."
            )
        return found

    # -- Γ -----------------------------------------------------------------------------------------------------------

    def pre_sigmoid(
        self, inputs: Mapping[str, Float[Tensor, "batch *pos _"]], keep: Bool[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch *pos C_total"]:
        """Γ's values before squashing, packed over sites, from the clean inputs of every site (detached here).

        ``keep`` is False at padding. Inputs without positions ``[batch, d_in]`` are taken as sequences of one.

        Raises:
            ValueError: some inputs have positions and others none, or their axes are others.
        """
        ranks = {x.ndim for x in inputs.values()}
        if len(ranks) > 1 or not ranks <= {2, 3}:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
            raise ValueError(
                f"The sites' inputs are {shapes}: Γ reads all sites of a token together, so they must all be [batch, pos, d_in] "
                "or all [batch, d_in]. Decompose the sites of one kind (VPDConfig(sites=...))."
            )
        if ranks == {2}:
            return self.pre_sigmoid(_with_positions(inputs), keep).squeeze(1)
        clean = {name: inputs[name].detach() for name in self.sites}
        device = next(iter(clean.values())).device
        if device != self.device:
            # A decomposition on the CPU serves a model on a GPU: a copy of it goes there for the call.
            tensors = {f"own.{name}": t.to(device) for name, t in self.state_dict(keep_vars=True).items()}
            return functional_call(_PreSigmoid(self), tensors, (inputs, keep))
        if self.gamma.needs == "acts":
            clean = {name: x @ self.V[name].detach().to(x.dtype) for name, x in clean.items()}
        elif len({id(inputs[name]) for name in self.sites}) < len(clean):
            # Sites that share one input tensor go on sharing it, so that Γ normalises it once.
            shared = {id(inputs[name]): x for name, x in clean.items()}
            clean = {name: shared[id(inputs[name])] for name in clean}
        return self.gamma(clean, keep)

    # -- conveniences that live in other rooms -----------------------------------------------------------------------

    def attach(
        self,
        model: nn.Module,
        *,
        sites: str | Sequence[str] | None = None,
        hooks: Sequence[str] = ("component_acts", "ci", "mask", "delta_mask"),
        check_weights: bool = True,
    ) -> Attached:
        """Puts the decomposition's HookPoints on the model; see ``tl_vpd.hooks.Attached``."""
        from tl_vpd.hooks import Attached

        return Attached(self, model, sites=sites, hooks=hooks, check_weights=check_weights)

    def causal_importances(self, model: nn.Module, prompts: Any, **arguments: Any) -> CausalImportances:
        """The importances of every subcomponent at every token; see ``tl_vpd.hooks.causal_importances``."""
        from tl_vpd.hooks import causal_importances

        return causal_importances(self, model, prompts, **arguments)

    def component_acts(self, model: nn.Module, prompts: Any, **arguments: Any) -> ComponentActs:
        """The inner activations of every subcomponent at every token; see ``tl_vpd.hooks.component_acts``."""
        from tl_vpd.hooks import component_acts

        return component_acts(self, model, prompts, **arguments)

    def adversarial_masks(self, model: nn.Module, prompts: Any, **arguments: Any) -> Masks:
        """The worst masks an adversary finds for prompts; see ``tl_vpd.hooks.adversarial_masks``."""
        from tl_vpd.hooks import adversarial_masks

        return adversarial_masks(self, model, prompts, **arguments)

    def mask_hooks(self, masks: Mapping[str, SiteMask] | Callable[..., Any]) -> list[tuple[str, Any]]:
        """``fwd_hooks`` that set these masks in an attached model; see ``tl_vpd.hooks.mask_hooks``."""
        from tl_vpd.hooks import mask_hooks

        return mask_hooks(self, masks)

    def delta_hooks(
        self, value: float, *, sites: str | Sequence[str] | None = None, pos: Any = None
    ) -> list[tuple[str, Any]]:
        """``fwd_hooks`` that set Δ's factor in an attached model; see ``tl_vpd.hooks.delta_hooks``."""
        from tl_vpd.hooks import delta_hooks

        return delta_hooks(self, value, sites=sites, pos=pos)

    def ablation_hooks(
        self,
        subcomponents: str | Subcomponent | Sequence[str | Subcomponent],
        *,
        pos: Any = None,
        amount: float = 1.0,
        values: Mapping[str, Tensor] | None = None,
    ) -> list[tuple[str, Any]]:
        """``fwd_hooks`` that take subcomponents out of an attached model; see ``tl_vpd.hooks.ablation_hooks``."""
        from tl_vpd.hooks import ablation_hooks

        return ablation_hooks(self, subcomponents, pos=pos, amount=amount, values=values)

    def ablation_table(
        self,
        model: nn.Module,
        prompts: Any,
        metric: Callable[[Tensor], Any],
        subcomponents: Sequence[str | Subcomponent] | None = None,
        **arguments: Any,
    ) -> pd.DataFrame:
        """A metric with each of many subcomponents ablated in turn; see ``tl_vpd.analysis.ablation_table``."""
        from tl_vpd.analysis import ablation_table

        return ablation_table(self, model, prompts, metric, subcomponents, **arguments)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Path:
        """Writes ``decomposition.safetensors`` and ``config.json``; ``dtype`` stores in another precision."""
        from tl_vpd.storage import save

        return save(self, Path(folder), dtype=dtype)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Decomposition:
        """Reads a folder written by ``save`` straight to a device and dtype (None: float32).

        Raises:
            FileNotFoundError: there is no such folder, or it is not a decomposition.
            ValueError: a file is damaged, or a key or shape is wrong; the message names it.
        """
        from tl_vpd.storage import load

        return load(Path(folder), device=torch.device(device), dtype=dtype or torch.float32)

    @classmethod
    def bundled(cls, *, device: str | torch.device = "cpu") -> Decomposition:
        """The finished decomposition of the bundled model that ships with the package."""
        from tl_vpd.bundled import decomposition

        return decomposition(device=device)

    @classmethod
    def from_hub(
        cls, repository: str, *, revision: str | None = None, device: str | torch.device = "cpu"
    ) -> Decomposition:
        """Loads ``user/repo`` from the Hugging Face Hub (downloads ``config.json`` and ``decomposition.safetensors``)."""
        from huggingface_hub import snapshot_download

        from tl_vpd.storage import CONFIG, TENSORS

        folder = snapshot_download(repository, revision=revision, allow_patterns=[CONFIG, TENSORS])
        return cls.load(folder, device=device)


class _PreSigmoid(nn.Module):
    """``Decomposition.pre_sigmoid`` as a ``forward``."""

    def __init__(self, own: Decomposition) -> None:
        super().__init__()
        self.own = own

    def forward(self, inputs: Mapping[str, Tensor], keep: Tensor | None) -> Tensor:
        return self.own.pre_sigmoid(inputs, keep)


def _with_positions(inputs: Mapping[str, Float[Tensor, "batch _"]]) -> dict[str, Float[Tensor, "batch 1 _"]]:
    """Inputs as sequences of one; tensors that were shared go on being shared."""
    shared = {id(x): x.unsqueeze(1) for x in inputs.values()}
    return {name: shared[id(x)] for name, x in inputs.items()}
