"""A decomposition as users have it: the numbers, with the methods that put them on a model.

    >>> vpd = Decomposition.load("gpt2-vpd")                  # doctest: +SKIP
    >>> with vpd.attach(model) as attached:                   # doctest: +SKIP
    ...     logits, cache = model.run_with_cache(tokens)
    ...     cache["q_ci", 1]

V, U, Γ and what identifies their target are ``tl_vpd.importance.DecomposedWeights``; what acts on a model is ``tl_vpd.hooks``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub import ModelCard
from jaxtyping import Float
from torch import Tensor, nn

import tl_vpd.hooks as hooks_room
from tl_vpd.adapters import adapt
from tl_vpd.checks import check_finite, config_of, device_of, shown
from tl_vpd.components.storage import CONFIG, TENSORS
from tl_vpd.files.hub import fetch
from tl_vpd.forward.target_check import fingerprints
from tl_vpd.hooks import Attached, CausalImportances, ComponentActs
from tl_vpd.hooks.ablations import FwdHooks
from tl_vpd.importance import DecomposedWeights, GammaConfig
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.publishing import CardConfig, Report, model_card, push
from tl_vpd.site import Subcomponent, nearest


class Decomposition(DecomposedWeights):
    """V, U and Γ for a set of sites of one target model, and what can be done with them on that model."""

    @classmethod
    def from_tensors(
        cls,
        model: nn.Module,
        V: Mapping[str, Float[Tensor, "d_in _"]],
        U: Mapping[str, Float[Tensor, "_ d_out"]],
        gamma: GammaConfig,
        gamma_tensors: Mapping[str, Tensor],
        *,
        record: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Decomposition:
        """A decomposition of ``model`` from tensors, which are copied to the model's device one after the other.

        A mapping's tensor is read when it is copied: one that makes its tensors on demand needs no memory for
        the others.

        Args:
            model: the target, whose weights are fingerprinted.
            V: read directions ``[d_in, C]`` by site.
            U: write directions ``[C, d_out]`` of the same sites.
            gamma: which Γ.
            gamma_tensors: Γ's parameters, by their names in its module.
            record: where it comes from: ``training`` (config), ``metrics``, ``target`` (name and settings), ``versions``.
            dtype: of the decomposition (None: V's).

        Raises:
            KeyError: the model does not have a site, or V and U (or Γ and its tensors) have other names.
            TypeError: an argument is of another type, such as arrays where tensors are needed.
            ValueError: there are no sites, a shape does not fit, or a tensor has NaN or infinite entries.
        """
        adapter = adapt(model)
        gamma = config_of(GammaConfig, gamma)
        for what, tensors_of in (("V", V), ("U", U), ("gamma_tensors", gamma_tensors)):
            if not isinstance(tensors_of, Mapping):
                raise TypeError(f"{what} is a {type(tensors_of).__name__}: give tensors by name, in a dict.")
        for name in {**V, **U}:
            if name not in adapter.sites:
                raise KeyError(
                    f"V or U names {shown(name)}: this model has no such site{nearest(name, adapter.sites)}."
                )
            if name not in V or name not in U:
                raise KeyError(f"{name} is in {'U' if name in U else 'V'} only: give V and U of the same sites.")
        names = [name for name in adapter.sites if name in V]
        if not names:
            raise ValueError("V and U are empty: give the matrices of one site or more.")
        sites, counts = [adapter.sites[name] for name in names], {name: _columns(name, V[name]) for name in names}
        gamma, prints = gamma.resolved(adapter.d_model), fingerprints(adapter, names)
        with torch.device("meta"):
            decomposition = cls(sites, counts, gamma, fingerprints=prints, record=record)
        decomposition.to(dtype or V[names[0]].dtype).to_empty(device=adapter.device)
        sources: dict[str, tuple[Mapping[str, Tensor], str]] = {}
        for name in names:
            sources |= {f"V/{name}": (V, name), f"U/{name}": (U, name)}
        sources |= {f"gamma/{name}": (gamma_tensors, name) for name in gamma_tensors}
        tensors = decomposition.file_tensors()
        if tensors.keys() != sources.keys():
            missing, extra = sorted(tensors.keys() - sources.keys()), sorted(sources.keys() - tensors.keys())
            raise KeyError(
                f"Γ ({gamma.kind}) needs the tensors {missing[:3]}, and does not know {extra[:3]}: rename gamma_tensors."
            )
        for key, tensor in tensors.items():
            mapping, name = sources[key]
            source = mapping[name]
            if not isinstance(source, Tensor):
                raise TypeError(f"{key} is a {type(source).__name__}: give a tensor.")
            if tensor.shape != source.shape:
                raise ValueError(f"{key} is {tuple(source.shape)}, and {tuple(tensor.shape)} is needed.")
            tensor.copy_(source)
            check_finite(key, tensor)
        return decomposition

    # -- on a model --------------------------------------------------------------------------------------------------

    def attach(
        self,
        model: nn.Module,
        *,
        sites: str | Sequence[str] | None = None,
        hooks: str | Sequence[str] = ("component_acts", "ci", "mask", "delta_mask"),
        check_weights: bool = True,
    ) -> Attached:
        """Puts the decomposition's HookPoints on the model; see ``tl_vpd.hooks.Attached``."""
        return Attached(self, model, sites=sites, hooks=hooks, check_weights=check_weights)

    def causal_importances(self, model: nn.Module, prompts: Any, **options: Any) -> CausalImportances:
        """The importances of every subcomponent at every token; see ``tl_vpd.hooks.causal_importances``."""
        return hooks_room.causal_importances(self, model, prompts, **options)

    def component_acts(self, model: nn.Module, prompts: Any, **options: Any) -> ComponentActs:
        """The inner activations of every subcomponent at every token; see ``tl_vpd.hooks.component_acts``."""
        return hooks_room.component_acts(self, model, prompts, **options)

    def adversarial_masks(self, model: nn.Module, prompts: Any, **options: Any) -> Masks:
        """The worst masks an adversary reaches for prompts; see ``tl_vpd.hooks.adversarial_masks``."""
        return hooks_room.adversarial_masks(self, model, prompts, **options)

    def compact(self, model: nn.Module, prompts: Any, **options: Any) -> Decomposition:
        """The decomposition without what is never important on prompts; see ``tl_vpd.hooks.compact``."""
        return hooks_room.compact(self, model, prompts, **options)

    def original_addresses(self) -> pd.DataFrame:
        """The address of every subcomponent before ``compact``; see ``tl_vpd.hooks.original_addresses``."""
        return hooks_room.original_addresses(self)

    # -- hooks for an attached model ---------------------------------------------------------------------------------

    def mask_hooks(self, masks: Mapping[str, SiteMask | Tensor] | Callable[..., Any]) -> FwdHooks:
        """``fwd_hooks`` that set these masks in an attached model; see ``tl_vpd.hooks.mask_hooks``."""
        return hooks_room.mask_hooks(self, masks)

    def delta_hooks(self, value: float, *, sites: str | Sequence[str] | None = None, pos: Any = None) -> FwdHooks:
        """``fwd_hooks`` that set Δ's factor in an attached model; see ``tl_vpd.hooks.delta_hooks``."""
        return hooks_room.delta_hooks(self, value, sites=sites, pos=pos)

    def ablation_hooks(
        self, subcomponents: str | Subcomponent | Sequence[str | Subcomponent], **options: Any
    ) -> FwdHooks:
        """``fwd_hooks`` that ablate subcomponents in an attached model; see ``tl_vpd.hooks.ablation_hooks``."""
        return hooks_room.ablation_hooks(self, subcomponents, **options)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Path:
        """Writes ``decomposition.safetensors``, which has everything, and ``config.json``, a copy of the config for people.

        A decomposition that is there is replaced: whatever happens meanwhile, the folder has the old one or the new one.

        Args:
            folder: made if needed.
            dtype: stores in another precision (float64, float32, bfloat16, float16).

        Raises:
            FileExistsError: the folder's ``config.json`` belongs to something else.
            OSError: the folder cannot be written; the message says what is safe.
            TypeError: ``record`` is not data, or ``dtype`` is not a dtype.
            ValueError: ``record`` or a tensor has values that are NaN or infinite, or too large for ``dtype``.
        """
        return self.write(_folder(folder), dtype=dtype)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Decomposition:
        """Reads a folder written by ``save``, tensor by tensor, straight to a device and dtype.

        Warns if ``config.json``, of which nothing is read, is missing or differs.

        Args:
            folder: that ``save`` wrote.
            device: where the decomposition goes.
            dtype: float64, float32, bfloat16 or float16 (None: float32).

        Raises:
            FileNotFoundError: there is no such folder, or it is not a decomposition.
            TypeError: the device or dtype is of another type.
            ValueError: there is no such device, a file is damaged, a key or shape is wrong, or values are too large for
                ``dtype``; the message says which.
        """
        return cls.read(_folder(folder), device=device_of(device), dtype=torch.float32 if dtype is None else dtype)

    @classmethod
    def bundled(cls, *, device: str | torch.device = "cpu") -> Decomposition:
        """The finished decomposition of the bundled model that ships with the package."""
        return cls.load(Path(__file__).parent / "bundled" / "decomposition", device=device)

    # -- the Hugging Face Hub ----------------------------------------------------------------------------------------

    @classmethod
    def from_hub(
        cls,
        repository: str,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Decomposition:
        """Loads ``user/repo`` from the Hugging Face Hub; without a network, what was fetched before.

        Args:
            repository: its name.
            revision: a branch, tag or commit (None: the main branch).
            device: where the decomposition goes.
            dtype: float64, float32, bfloat16 or float16 (None: float32).

        Raises:
            FileNotFoundError: the repository is not a decomposition.
            OSError: it cannot be fetched; the message says why.
            TypeError: an argument is of another type.
            ValueError: its name is not one, or what was fetched is damaged.
        """
        try:
            folder = fetch(repository, TENSORS, others=[CONFIG], revision=revision)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"This is not a decomposition: {error}") from error
        try:
            return cls.load(folder, device=device, dtype=dtype)
        except ValueError as error:
            text = str(error).rstrip(".")
            raise ValueError(f"{repository}: {text}; if a file is damaged, delete {folder} and try again.") from error

    def push_to_hub(
        self,
        repository: str,
        *,
        report: Report | None = None,
        card: CardConfig | None = None,
        private: bool | None = None,
        revision: str | None = None,
    ) -> str:
        """Pushes to ``user/repo`` on the Hugging Face Hub, in one commit with a card, and returns the address of the commit.

        Args:
            repository: its name; made if needed.
            report: of ``tl_vpd.evaluate``, for the card and as ``metrics.json`` (None: the card says "not evaluated").
            card: licences and names.
            private: whether only people with access see it (None: as it is, or as the account makes new ones).
            revision: a branch, made if needed (None: the main branch).

        Raises:
            FileExistsError: the repository belongs to something else, or is public where private was asked (or the reverse).
            OSError: the Hub does not accept it; the message says why, and the repository is as it was.
            TypeError: an argument is of another type.
            ValueError: a name is not one, the report is of another decomposition, or a tensor has values that are not finite.
        """
        return push(self, repository, report=report, card=card, private=private, revision=revision)

    def model_card(
        self, repository: str | None = None, *, report: Report | None = None, card: CardConfig | None = None
    ) -> ModelCard:
        """The card that ``push_to_hub`` writes as ``README.md``; see ``tl_vpd.publishing.model_card``."""
        return model_card(self, repository, report=report, config=card)


def _folder(folder: str | os.PathLike[str]) -> Path:
    """A folder's path; raises TypeError or NotADirectoryError for anything else."""
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"The folder is a {type(folder).__name__}: give its path.")
    try:
        is_file = Path(folder).is_file()
    except OSError as error:
        raise ValueError(f"folder={shown(str(folder))} is not a path: {error.strerror}.") from error
    if is_file:
        raise NotADirectoryError(f"{folder} is a file: give the folder of a decomposition.")
    if "\0" in os.fspath(folder):
        raise ValueError(f"folder={shown(str(folder))} is not a path: it has a null character.")
    return Path(folder)


def _columns(name: str, V: Tensor) -> int:
    """Number of subcomponents of a site's read directions; raises TypeError or ValueError if they are not a matrix."""
    if not isinstance(V, Tensor):
        raise TypeError(f"V/{name} is a {type(V).__name__}: give a tensor [d_in, C].")
    if V.ndim != 2 or not V.is_floating_point():
        raise ValueError(f"V/{name} is {tuple(V.shape)} of {V.dtype}: give floating-point numbers [d_in, C].")
    return V.shape[1]
