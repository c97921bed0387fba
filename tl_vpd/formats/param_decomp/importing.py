"""``import_run``: a run of the authors' code as two folders of ours, which need neither the run nor the network again.

>>> import_run("s-55ea3f9b", "vpd-4l")                                      # doctest: +SKIP
>>> vpd = Decomposition.load("vpd-4l")                                      # doctest: +SKIP
>>> model = load_model("vpd-4l/model", kind="bridge")                       # doctest: +SKIP
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from tl_vpd.adapters.arcee import arcee_of, write_arcee
from tl_vpd.adapters.loading import default_kind
from tl_vpd.checks import path_of
from tl_vpd.files.atomic import new_folder
from tl_vpd.formats.param_decomp.certificate import Certificate
from tl_vpd.formats.param_decomp.load import KINDS, load_param_decomp

MODEL = "model"


def import_run(
    run: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    target: str | os.PathLike[str] | None = None,
    tokens: Tensor | None = None,
    check_order: bool = True,
) -> Certificate:
    """Writes a run's decomposition, with its certificate in the record, and its model.

    Args:
        run: as in ``load_param_decomp``.
        folder: of the decomposition; does not exist, or is empty. ``model`` in it has the target, as transformers stores it,
            which ``load_model`` and ``TransformerBridge.boot_transformers`` read.
        device: that the certificate is measured on.
        dtype: that both are stored in.
        target: as in ``load_param_decomp``.
        tokens: as in ``load_param_decomp``.
        check_order: as in ``load_param_decomp``.

    Returns:
        What the decomposition was measured to be.

    Raises:
        FileExistsError: there is something in the folder.
        ValueError: as in ``load_param_decomp``; nothing is written then.
        OSError: the folder cannot be written.
    """
    place, here = path_of("folder", folder), default_kind()
    model_class = next(name for name, kind in KINDS.items() if kind == here)
    with new_folder(place) as written:
        model, vpd = load_param_decomp(
            run, model_class, device=device, dtype=dtype, target=target, tokens=tokens, check_order=check_order
        )
        vpd.save(written)
        (written / MODEL).mkdir()
        shape, weights = arcee_of(model)
        write_arcee(shape, {name: W.cpu() for name, W in weights.items()}, written / MODEL, model.tokenizer)
    return Certificate(**vpd.record["certificate"])
