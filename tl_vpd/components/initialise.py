"""Where subcomponents start: random directions, or the weight's channels.

*normal* (the paper): V and U normal with standard deviation ``1/√d_in`` and ``1/√C``.

*channels* (the authors' newer recipe): one subcomponent for each neuron (MLP weights) or head channel (attention weights),
so that the sum is the weight itself and a subcomponent starts as something that is often idle::

    Q, K, V, in, gate   channel i of the output:   V[:, i] = W[:, i] / √‖W[:, i]‖,    U[i] = √‖W[:, i]‖ · e_i
    O, out              channel i of the input:    V[:, i] = √‖W[i]‖ · e_i,           U[i] = W[i] / √‖W[i]‖

With fewer subcomponents than channels, the largest channels are used; subcomponents beyond the channels start as random
directions that write (almost) nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.components.components import Components

IDLE = 0.01
"""Scale of the write directions of subcomponents beyond the number of channels."""


@torch.no_grad()
def start_at_channels(components: Components, site: str, W: Float[Tensor, "d_in d_out"]) -> None:
    """Sets one site's V and U to the channels of its weight."""
    V, U = components.V[site], components.U[site]
    reads = components.sites[site].short in ("o", "out")
    channels = W.to(V) if reads else W.to(V).T  # [channel, the other side]
    norms = channels.norm(dim=-1)
    n = min(len(channels), V.shape[1])
    chosen = norms.argsort(descending=True)[:n].sort().values
    scale = norms[chosen].sqrt().clamp_min(1e-12)
    rows = channels[chosen] / scale[:, None]
    units = torch.zeros(n, len(channels), dtype=V.dtype, device=V.device)
    units[torch.arange(n, device=V.device), chosen] = scale
    U.mul_(IDLE)
    V[:, :n] = units.T if reads else rows.T
    U[:n] = rows if reads else units
