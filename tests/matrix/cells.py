"""Every cell of the matrix for the installed TransformerLens, and what running one gives."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import nn

from tests.matrix import checks, exchange, inputs
from tests.matrix.checks import CHECKS, Case
from tests.matrix.families import FAMILIES
from tests.matrix.models import KINDS, PROCESSING, Absent, Kind, build, kinds_here
from tests.tiny import decomposition_of
from tl_vpd.adapters import Unsupported

Status = Literal["ok", "refused", "absent", "failed"]


@dataclass(frozen=True)
class Flag:
    """One way to load or set a model.

    ``sets``: flags turned on with ``model.set_…(True)``. ``processing``: which weight processing is on.
    """

    name: str
    sets: tuple[str, ...] = ()
    processing: Mapping[str, bool] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    checks: tuple[Callable[[Case], None], ...] = CHECKS


def _processing(*on: str) -> dict[str, bool]:
    return {name: name in on for name in PROCESSING}


_DOUBLE = (torch.float64,)
FLAGS: dict[str, Flag] = {
    flag.name: flag
    for flag in (
        Flag("none"),
        Flag("use_attn_result", sets=("use_attn_result",)),
        Flag("use_split_qkv_input", sets=("use_split_qkv_input",)),
        Flag("use_attn_in", sets=("use_attn_in",)),
        Flag("use_hook_mlp_in", sets=("use_hook_mlp_in",)),
        Flag("ungroup_grouped_query_attention", sets=("ungroup_grouped_query_attention",)),
        Flag("ungroup + use_split_qkv_input", sets=("ungroup_grouped_query_attention", "use_split_qkv_input")),
        Flag("fold_ln", processing=_processing("fold_ln")),
        Flag("center_writing_weights", processing=_processing("center_writing_weights")),
        Flag("fold_value_biases", processing=_processing("fold_value_biases")),
        Flag("all processing", processing=_processing(*PROCESSING)),
        Flag("bfloat16", dtypes=(torch.bfloat16,)),
        Flag("float16", dtypes=(torch.float16,)),
        Flag("left padding", dtypes=(torch.float32,), checks=(inputs.padding_is_left_out,)),
        Flag("KV cache", dtypes=_DOUBLE, checks=(inputs.a_kv_cache_changes_nothing,)),
        Flag("one file for every class", dtypes=_DOUBLE, checks=(exchange.one_file_for_every_class,)),
    )
}


@dataclass(frozen=True)
class Cell:
    """One family as one class under one flag."""

    family: str
    kind: Kind
    flag: str

    def __str__(self) -> str:
        return f"{self.family}, {self.kind}, {self.flag}"


@dataclass(frozen=True)
class Result:
    """What running a cell gave.

    ``status``: ``ok``, ``refused`` (the message names the flag), ``absent`` (there is no such model or flag) or ``failed``.
    ``by``: who refused. ``checked``: the checks that hold.
    """

    cell: Cell
    status: Status
    message: str = ""
    by: str = ""
    checked: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**asdict(self.cell), **{k: v for k, v in asdict(self).items() if k != "cell"}}


def version_here() -> str:
    """The installed TransformerLens, ``3.9``."""
    return ".".join(version("transformer_lens").split(".")[:2])


def cells() -> Iterator[Cell]:
    """Every cell of this version: families × classes × flags."""
    for family in FAMILIES:
        for kind in KINDS:
            if kind in kinds_here():
                yield from (Cell(family, kind, flag) for flag in FLAGS)


def run(cell: Cell, *, lean: bool = False) -> Result:
    """Runs a cell's checks in each of its dtypes (``lean``: in the first alone, without the checks that rest on others)."""
    flag = FLAGS[cell.flag]
    checked: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in flag.dtypes[:1] if lean else flag.dtypes:
            try:
                case = _case(cell, flag, dtype)
            except Absent as error:
                return Result(cell, "absent", str(error))
            except _Refused as error:
                return _named(Result(cell, "refused", str(error), error.by), flag)
            except Exception:
                return Result(cell, "failed", _tail())
            checks_of_cell = list(flag.checks)
            if dtype != flag.dtypes[0]:
                checks_of_cell = [checks.ones_change_no_bit, checks.constant_masks_are_edited_weights]
            elif cell.flag == "none":
                checks_of_cell.append(checks.masks_of_positions_are_an_independent_forward)
                if lean:
                    checks_of_cell = [check for check in checks_of_cell if check not in checks.OF_ACTS_AND_GRADIENTS]
            for check in checks_of_cell:
                try:
                    check(case)
                except Absent as error:
                    return Result(cell, "absent", str(error))
                except Exception:
                    return Result(cell, "failed", f"{check.__name__} in {dtype}: {_tail()}")
                checked.append(f"{check.__name__}, {str(dtype).removeprefix('torch.')}")
    return Result(cell, "ok", checked=tuple(checked))


class _Refused(Exception):
    def __init__(self, by: str, message: str) -> None:
        super().__init__(message)
        self.by = by


def _case(cell: Cell, flag: Flag, dtype: torch.dtype) -> Case:
    def again(source: nn.Module | None = None) -> Any:
        model = build(cell.family, cell.kind, dtype, processing=flag.processing, source=source)
        for name in flag.sets:
            set_flag(model, name)
        return model

    try:
        model = again()
        with torch.no_grad():
            model(checks.tokens())
    except Absent:
        raise
    except Exception as error:
        raise _Refused("TransformerLens", _of_transformer_lens(error)) from error
    try:
        vpd = decomposition_of(model)
        vpd = vpd.double() if dtype == torch.float64 else vpd
        vpd.attach(model).detach()
    except Unsupported as error:
        raise _Refused("tl_vpd", str(error)) from error
    processed = cell.kind == "compatible" or flag.processing is not None
    return Case(cell.family, cell.kind, dtype, model, vpd, again, processed)


def set_flag(model: Any, name: str) -> None:
    """``model.set_…(True)``; raises Absent where the class has no such flag."""
    setter = getattr(model, f"set_{name}", None)
    if setter is None:
        raise Absent(f"{type(model).__name__} has no {name}")
    setter(True)


def _of_transformer_lens(error: Exception) -> str:
    """The message of an error raised in TransformerLens; any other error is raised again."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if not any("/transformer_lens/" in f for f in files) or any("/tl_vpd/" in f for f in files):
        raise error
    return f"{type(error).__name__}: {error}".strip()


def _named(result: Result, flag: Flag) -> Result:
    """The result, failed if its message names neither the flag nor the setting of the family that is in the way."""
    words = flag.sets or tuple(k for k, on in (flag.processing or {}).items() if on)
    act_fn = (FAMILIES[result.cell.family].native or {}).get("act_fn")
    if f"act_fn={act_fn!r}" in result.message or any(re.sub(r"^use_|_input$", "", w) in result.message for w in words):
        return result
    return Result(result.cell, "failed", f"the refusal names none of {words}: {result.message}")


def _tail() -> str:
    return "".join(traceback.format_exc().splitlines(keepends=True)[-8:])
