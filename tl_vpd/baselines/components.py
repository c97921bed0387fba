"""Components of full rank that span all sites, as APD has them, and the model run on a masked sum of them.

    P_c,l = Σ_k A_c,l,:k ⊗ B_c,l,k:            a component c has a matrix in every site l
    y_l = x_l · Σ_c s_c P_c,l + b_l            s_c: which components are used at an input

>>> import torch
>>> FullComponents({"a": (4, 3)}, C=5).matrices("a").shape
torch.Size([5, 4, 3])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tl_vpd.adapters import Adapter
from tl_vpd.checks import integer, seed_of
from tl_vpd.forward import SitePass, SiteTaps


class FullComponents(nn.Module):
    """Factors A ``[C, d_in, rank]`` and B ``[C, rank, d_out]`` of every site, with rank ``min(d_in, d_out)``.

    Args:
        shapes: (d_in, d_out) by site.
        C: components.
        tied: pairs of sites that are one matrix, the second transposed; its factors are the first's: ``P₂ = P₁ᵀ``.
        seed: of the initialisation.

    Raises:
        TypeError: a number is of another type.
        ValueError: there are no components, or the seed is too large.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        C: int,
        *,
        tied: Sequence[tuple[str, str]] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        C = integer("C", C, minimum=1)
        generator = torch.Generator().manual_seed(seed_of(seed))
        self.names, self.shapes, self.C = list(shapes), dict(shapes), C
        self.leads = {second: first for first, second in tied}
        self.leaders = [site for site in shapes if site not in self.leads]
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for site in self.leaders:
            d_in, d_out = shapes[site]
            rank = min(d_in, d_out)
            # The sum of C products of these has entries of the size of a weight with unit gain.
            scale = (d_in * rank * C) ** -0.25
            self.A.append(nn.Parameter(scale * torch.randn(C, d_in, rank, generator=generator)))
            self.B.append(nn.Parameter(scale * torch.randn(C, rank, d_out, generator=generator)))

    def factors(self, site: str) -> tuple[Float[Tensor, "C d_in rank"], Float[Tensor, "C rank d_out"]]:
        """A and B of a site."""
        at = self.leaders.index(self.leads.get(site, site))
        A, B = self.A[at], self.B[at]
        return (B.mT, A.mT) if site in self.leads else (A, B)

    def matrices(self, site: str) -> Float[Tensor, "C d_in d_out"]:
        """Every component's matrix in a site."""
        A, B = self.factors(site)
        return A @ B

    def masked(
        self, site: str, x: Float[Tensor, "*batch d_in"], s: Float[Tensor, "*#batch C"]
    ) -> Float[Tensor, "*batch d_out"]:
        """``x · Σ_c s_c P_c``."""
        A, B = self.factors(site)
        inner = torch.einsum("... i, c i k -> ... c k", x, A) * s.unsqueeze(-1)
        return torch.einsum("... c k, c k o -> ... o", inner, B)


@contextmanager
def on_components(
    adapter: Adapter, components: FullComponents, masks: Mapping[str, Float[Tensor, "*batch C"]]
) -> Iterator[None]:
    """Within it the model's sites run on masked components instead of their weights."""

    def masked(site: str, x: Tensor, y: Tensor) -> Tensor:
        bias = adapter.bias(site)
        output = components.masked(site, x, masks[site])
        return output if bias is None else output + bias

    taps = SiteTaps(adapter, components.names)
    with taps.on(), taps.during(SitePass(masked)):
        yield


def output_gradients(
    adapter: Adapter, sites: list[str], inputs: Shaped[Tensor, "batch pos ..."]
) -> tuple[
    Float[Tensor, "batch pos d"],
    dict[str, Float[Tensor, "batch pos _"]],
    dict[str, Float[Tensor, "d batch pos _"]],
]:
    """The target's output, every site's input, and the gradient of each output dimension with respect to each site's output.

    Positions must not see each other (models of vectors): one backward pass then serves a whole batch.
    """
    site_inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(site: str, x: Tensor, y: Tensor) -> Tensor:
        site_inputs[site] = x
        outputs[site] = y.detach().requires_grad_() if not y.requires_grad else y
        return outputs[site]

    taps = SiteTaps(adapter, sites)
    with taps.on(), taps.during(SitePass(note)), torch.enable_grad():
        target = adapter.run(inputs, None)
        ordered = [outputs[site] for site in sites]
        rows = [torch.autograd.grad(target[..., o].sum(), ordered, retain_graph=True) for o in range(target.shape[-1])]
    gradients = {site: torch.stack([row[i] for row in rows]) for i, site in enumerate(sites)}
    return target.detach(), {site: x.detach() for site, x in site_inputs.items()}, gradients
