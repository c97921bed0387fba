"""What other tools' names of hooks mean for a transcoder here: it reads an MLP's input, or (SAEs) its output.

``ln2.hook_normalized`` is an MLP's input where the norm's weight is folded into the MLP's (and in TransformerLens 2.x always);
``ReplacedModel.check`` refuses such transcoders on a model whose norms are not folded.
"""

from __future__ import annotations

import re

from tl_vpd.checks import shown

INPUTS = ("mlp.hook_in", "ln2.hook_normalized")
OUTPUTS = ("mlp.hook_out", "hook_mlp_out")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def layer_of(hook: object, what: str) -> tuple[int, str]:
    """The layer of ``blocks.{i}.…`` and the rest of the name.

    Args:
        hook: the name.
        what: the file that has it, for messages.

    Raises:
        ValueError: it is not of a block.
    """
    match = _BLOCK.fullmatch(hook) if isinstance(hook, str) else None
    if match is None:
        raise ValueError(f"{what}: the hook {shown(hook)} is not of a block: 'blocks.0.{INPUTS[0]}' is.")
    return int(match[1]), match[2]


def check_input(hook: object, what: str) -> dict[str, str]:
    """The record of what encoders read.

    Args:
        hook: its name without the block.
        what: the file that has it, for messages.

    Raises:
        ValueError: it is not an MLP's input.
    """
    if hook not in INPUTS:
        raise ValueError(f"{what} reads {shown(hook)}: transcoders of an MLP's input ({', '.join(INPUTS)}) are read.")
    return {"input_hook": str(hook)}


def check_output(hook: object, what: str) -> None:
    """Raises ValueError unless a hook is an MLP's output.

    Args:
        hook: its name without the block.
        what: the file that has it, for messages.
    """
    if hook not in OUTPUTS:
        raise ValueError(
            f"{what} writes to {shown(hook)}: transcoders of an MLP's output ({', '.join(OUTPUTS)}) are read."
        )
