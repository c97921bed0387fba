"""What Γ reads: every site's input, or the residual stream at the entry of every block that has decomposed sites.

The authors' newer recipe reads the residual stream: one tensor per block in place of the inputs of its sites, all of which are
computed from it.

>>> sites = [Site("blocks.0.attn.W_Q", 8, 8, 2, 4), Site("blocks.0.mlp.W_out", 32, 8), Site("blocks.3.mlp.W_in", 8, 32)]
>>> inputs_of("residual", sites)
{'blocks.0.hook_resid_pre': 8, 'blocks.3.hook_resid_pre': 8}
>>> inputs_of("sites", sites)["blocks.0.mlp.W_out"]
32
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from tl_vpd.site import Site

Reads = Literal["sites", "residual"]
STREAM = "hook_resid_pre"
"""The hook of a block that shows the residual stream as it enters."""


def input_of(reads: Reads, site: Site) -> str:
    """The name of what Γ reads for a site: the site's own, or that of its block's hook.

    Raises:
        ValueError: the residual stream is to be read, and the site is not in a block.
    """
    if reads == "sites":
        return site.name
    if site.home == site.name:
        raise ValueError(
            f"GammaConfig(reads='residual') needs sites in the blocks of a transformer, and {site.name} is not in one: use "
            "reads='sites'."
        )
    return f"{site.home}.{STREAM}"


def inputs_of(reads: Reads, sites: Iterable[Site]) -> dict[str, int]:
    """The widths of what Γ reads, by name, in the order in which it is concatenated.

    Args:
        reads: which inputs.
        sites: the decomposed ones.

    Raises:
        ValueError: the residual stream is to be read, and a site is not in a block.
    """
    if reads == "sites":
        return {site.name: site.d_in for site in sites}
    return {input_of(reads, s): s.d_out if s.short in ("o", "out") else s.d_in for s in sites}


def layer_of(name: str) -> int | None:
    """The block whose residual stream an input is (None: it is a site's input)."""
    path, _, hook = name.rpartition(".")
    return int(path.rpartition(".")[2]) if hook == STREAM else None
