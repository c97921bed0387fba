"""``load_param_decomp``: a run of the authors' code as a model of TransformerLens and a decomposition of it.

    >>> model, vpd = load_param_decomp("s-55ea3f9b")                     # doctest: +SKIP
    >>> vpd.record["certificate"]["kl_ci"]                              # doctest: +SKIP

The files: ``files``. What the config says: ``config``. What the checkpoint holds, in every variant: ``checkpoint``. Left out:
other targets than LlamaSimpleMLP, and other kinds of Γ than a shared transformer and small MLPs; they are refused by name.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tl_vpd.adapters import adapt
from tl_vpd.adapters.arcee import ArceeShape, write_arcee
from tl_vpd.adapters.building import Kind, load_arcee
from tl_vpd.checks import choice, device_of, instance, path_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.files.versions import library_versions
from tl_vpd.formats.param_decomp.certificate import Certificate, certify
from tl_vpd.formats.param_decomp.checkpoint import FLOATS, Checkpoint, read_checkpoint
from tl_vpd.formats.param_decomp.config import RunConfig
from tl_vpd.formats.param_decomp.files import CONFIGS, checkpoint_in, first_of, inside, read_yaml, step_of
from tl_vpd.formats.param_decomp.gamma import our_gamma
from tl_vpd.formats.param_decomp.metrics import own_metrics
from tl_vpd.formats.param_decomp.names import site_of
from tl_vpd.formats.param_decomp.target import (
    shape_of,
    target_config,
    target_folder,
    target_from_folder,
    target_weights,
)
from tl_vpd.formats.param_decomp.tokenizer import tokenizer_of
from tl_vpd.formats.param_decomp.wandb_runs import fetched_run, fetched_target, wandb_path

ModelClass = Literal["HookedTransformer", "TransformerBridge"]
KINDS: dict[str, Kind] = {"HookedTransformer": "hooked_transformer", "TransformerBridge": "bridge"}


def load_param_decomp(
    run: str | os.PathLike[str],
    model_class: ModelClass | str = "HookedTransformer",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    target: str | os.PathLike[str] | None = None,
    tokens: Tensor | None = None,
    check_order: bool = True,
) -> tuple[Any, Decomposition]:
    """A released run, or any of the authors' torch code on a LlamaSimpleMLP, as a model and its decomposition.

    Nothing in the files is executed. A folder needs no network.

    Args:
        run: a folder with a config and ``model_<step>.pth``, the path of such a file, or the id of a Weights & Biases run
            (``s-55ea3f9b``, ``entity/project/runs/id``), which needs ``pip install 'tl_vpd[runs]'`` and is fetched once.
        model_class: ``HookedTransformer`` (TransformerLens 2 and 3) or ``TransformerBridge`` (3 and 4).
        device: where both go.
        dtype: of both.
        target: the target's folder, with ``model_config.yaml`` and, if the run has only the decomposition,
            ``model_step_<step>.pt`` (None: the run's folder, ``target`` or the target's id in it or beside it).
        tokens: rows ``[n, pos]`` for the certificate (None: a text, or rows sampled from the model where there is no tokenizer).
        check_order: whether to stop when importances look like those of a wrong order.

    Returns:
        The model and the decomposition. ``record["certificate"]`` has what was measured, ``record["source"]`` the files.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks a file.
        ValueError: a file is damaged, of another format, or contradicts another; the message names it.
        ImportError: the installed TransformerLens has no such class, or ``wandb`` is needed.
    """
    kind, device = KINDS[choice("model_class", model_class, KINDS)], device_of(device)
    if instance("dtype", dtype, torch.dtype) not in FLOATS:
        raise ValueError(f"dtype={dtype}: give one of {', '.join(map(str, FLOATS))}.")
    files = RunFiles.of(run, target)
    metrics = files.metrics()
    model, vpd = model_and_decomposition(files, kind, device=device, dtype=dtype)
    certificate = certify(vpd, model, tokens, own_metrics=metrics)
    vpd.record["certificate"] = certificate.as_record()
    if check_order and certificate.order_is_doubtful:
        raise ValueError(_wrong_order(files, certificate))
    return model, vpd


@dataclass(frozen=True)
class RunFiles:
    """A run's files, read as far as names and shapes.

    Attributes:
        folder: of the run.
        checkpoint: its tensors.
        config: its settings.
        target_folder: with the target's config (None: the target is the paper's).
    """

    folder: Path
    checkpoint: Checkpoint
    config: RunConfig
    target_folder: Path | None

    @classmethod
    def of(cls, run: str | os.PathLike[str], target: str | os.PathLike[str] | None) -> RunFiles:
        """Finds and reads them; raises as ``load_param_decomp`` does."""
        folder, path, fetched = _located(run)
        config_file = first_of(folder, CONFIGS)
        config = RunConfig.read(read_yaml(config_file), str(config_file)) if config_file else None
        checkpoint = read_checkpoint(path or checkpoint_in(folder))
        if checkpoint.settings is not None:
            config = RunConfig.read(checkpoint.settings, str(checkpoint.path))
        if config is None:
            raise FileNotFoundError(f"{folder} has none of {' and '.join(CONFIGS)}: the run's config is needed.")
        config.check_counts(checkpoint.counts)
        if target is not None:
            found: Path | None = _target_at(target)
        elif fetched and config.target and wandb_path(config.target):
            found = fetched_target(config.target, with_checkpoint=not _whole(checkpoint))
        else:
            found = target_folder(folder, config.target)
        return cls(folder, checkpoint, config, found)

    def target(self) -> tuple[ArceeShape, dict[str, Tensor]]:
        """The target's sizes and weights."""
        settings, source = target_config(self.target_folder, self.config.target)
        shape = shape_of(settings, source)
        stored = self.checkpoint.target
        if _whole(self.checkpoint):
            return shape, target_weights(stored, shape, str(self.checkpoint.path))
        if self.target_folder is None:
            raise FileNotFoundError(
                f"{self.checkpoint.path} does not hold the target's weights: pass target=FOLDER, the one of {self.config.target}."
            )
        weights = target_from_folder(self.target_folder, shape)
        for name, tensor in target_weights(stored, shape, str(self.checkpoint.path), complete=False).items():
            if not torch.equal(tensor.float(), weights[name].float()):
                raise ValueError(
                    f"{self.target_folder} is another target than the one of {self.checkpoint.path}: {name} differs."
                )
        return shape, weights

    def metrics(self) -> dict[str, float]:
        """The run's own metrics."""
        return own_metrics(self.folder, self.checkpoint.metrics)


def model_and_decomposition(
    files: RunFiles, kind: Kind, *, device: str | torch.device, dtype: torch.dtype
) -> tuple[Any, Decomposition]:
    """The model and the decomposition of a run's files, not measured.

    Args:
        files: of the run.
        kind: of model.
        device: where both go.
        dtype: of both.

    Raises:
        ValueError: a file is damaged or contradicts another.
        ImportError: the installed TransformerLens has no such class.
    """
    shape, weights = files.target()
    tokenizer = tokenizer_of(files.target_folder or files.folder, files.config.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        write_arcee(shape, weights, Path(folder), tokenizer)
        del weights
        model = load_arcee(Path(folder), kind=kind, device=device, dtype=dtype)
    return model, _decomposition(files, model, dtype)


def _decomposition(files: RunFiles, model: Any, dtype: torch.dtype) -> Decomposition:
    checkpoint, adapter = files.checkpoint, adapt(model)
    sites = {site_of(module) or "": module for module in checkpoint.modules}
    order = [name for name in adapter.sites if name in sites]
    missing = sites.keys() - adapter.sites.keys()
    if missing:
        raise ValueError(f"{checkpoint.path} decomposes {sites[min(missing)]}, and the target has no such layer.")
    for name in order:
        site, module = adapter.sites[name], sites[name]
        came = (checkpoint.V[module].shape[0], checkpoint.U[module].shape[1])
        if came != (site.d_in, site.d_out):
            raise ValueError(
                f"{checkpoint.path}: V and U of {module} are for a {came[0]}x{came[1]} matrix, and the target's is "
                f"{site.d_in}x{site.d_out}."
            )
    d_in = {module: adapter.sites[name].d_in for name, module in sites.items()}
    record = {
        "source": {
            "format": "param_decomp",
            "checkpoint": checkpoint.path.name,
            "step": step_of(checkpoint.path),
            "run": files.folder.name,
            "target": files.config.target,
            "settings": files.config.settings,
        },
        "versions": library_versions(),
    }
    return Decomposition.from_tensors(
        model,
        {name: checkpoint.V[sites[name]] for name in order},
        {name: checkpoint.U[sites[name]] for name in order},
        files.config.gamma,
        our_gamma(checkpoint, files.config.gamma, order, d_in),
        record=record,
        dtype=dtype,
    )


def _located(run: str | os.PathLike[str]) -> tuple[Path, Path | None, bool]:
    """The run's folder, its checkpoint where a file was given, and whether it was fetched."""
    path = path_of("run", run).expanduser()
    if path.is_dir():
        return path, None, False
    if path.exists() or path.is_symlink():
        return path.parent, inside(path, path.parent), False
    reference = wandb_path(str(run))
    if reference is None:
        raise FileNotFoundError(
            f"{run} is neither a folder or checkpoint nor the id of a Weights & Biases run (such as s-55ea3f9b): give one."
        )
    return fetched_run(reference), None, True


def _target_at(target: str | os.PathLike[str]) -> Path:
    path = path_of("target", target).expanduser()
    if not path.is_dir() and wandb_path(str(target)) is not None:
        return fetched_target(str(target), with_checkpoint=True)
    if first_of(path, ["model_config.yaml"]) is None:
        raise FileNotFoundError(f"target={target} has no model_config.yaml: give the folder of the target's run.")
    return path


def _whole(checkpoint: Checkpoint) -> bool:
    """Whether the target's weights are in the checkpoint, not those of decomposed layers alone."""
    return "wte.weight" in checkpoint.target


def _wrong_order(files: RunFiles, certificate: Certificate) -> str:
    others = {"shuffled": certificate.kl_shuffled, **certificate.kl_other_orders}
    return (
        f"The importances of {files.checkpoint.path} look like those of a wrong order of modules: as masks they give KL "
        f"{certificate.kl_ci:.3f} ({', '.join(f'{name}: {kl:.3f}' for name, kl in others.items())}); an untrained Γ looks the "
        "same, and check_order=False imports it."
    )
