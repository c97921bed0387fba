"""What a decomposition costs on a model, as ratios to the plain model in the same run: the processor's seconds of one thread.

    python -m benchmarks.hooks                       # writes benchmarks/results/hooks.json (about five minutes)

``idle``                      attached, no hook listening
``read_one_site``             one site's activations cached (``read_one_site_product_only``: the plain model and that one product)
``ablate_8``                  eight subcomponents of one site ablated (``ablate_8_sites``: one of each of eight sites)
``all_masked``                every site masked with a mask for every token and subcomponent, Δ's too
``all_masked_products_only``  the plain model and the two extra products of every site, nothing else

The model is a random HookedTransformer (or TransformerBridge) of four GPT-2-small layers; C = 2 · min(d_in, d_out).
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import ratio, seconds_in_turn
from benchmarks.models import hooked_transformer
from tl_vpd import Decomposition, VPDConfig
from tl_vpd.adapters import adapt
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.training import new_decomposition

LAYERS, D_MODEL, HEADS, VOCABULARY = 4, 768, 12, 5000


def transformer(context: int) -> Any:
    """Four layers of GPT-2 small's shape with random weights."""
    return hooked_transformer(
        layers=LAYERS, d_model=D_MODEL, heads=HEADS, vocabulary=VOCABULARY, context=context, act_fn="gelu_new"
    )


def bridge(context: int) -> Any:
    """The same shape as a TransformerBridge around transformers' GPT-2."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS,
        n_embd=D_MODEL,
        n_head=HEADS,
        vocab_size=VOCABULARY,
        n_positions=context,
        attn_implementation="eager",
    )
    source = GPT2LMHeadModel(config).eval()
    return build_bridge_from_module(source, architecture="GPT2LMHeadModel", hf_config=config, tokenizer=None)


class _ProductsOnly:
    """Taps that compute ``(x @ V) @ U`` at every site and discard it."""

    def __init__(self, model: Any, vpd: Decomposition) -> None:
        self.handles: list[Any] = []
        self.inputs: dict[str, Tensor] = {}
        self.adapter = adapt(model)
        for name in vpd.sites:
            layout, V, U = self.adapter.layout(name), vpd.V[name], vpd.U[name]

            def read(x: Tensor, name: str = name, layout: Any = layout) -> None:
                self.inputs[name] = layout.input_of_site(x)

            def write(y: Tensor, name: str = name, V: Tensor = V, U: Tensor = U) -> None:
                (self.inputs.pop(name) @ V) @ U

            self.handles += self.adapter.tap(name, read, write)

    def remove(self) -> None:
        """Removes the taps."""
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def measure(build: Callable[[int], Any], batch: int, context: int, rounds: int) -> dict[str, Any]:
    """All ratios for one class of models; each variant has another model, so that none runs another's hooks."""
    tokens = torch.randint(0, VOCABULARY, (batch, context), generator=torch.Generator().manual_seed(0))
    models = {name: build(context) for name in ("plain", "attached", "products")}
    adapter = adapt(models["plain"])
    counts = {name: 2 * site.rank for name, site in adapter.sites.items()}
    vpd = new_decomposition(models["plain"], VPDConfig(C=counts, gamma={"d_ci": 8, "n_blocks": 1, "n_heads": 2}))
    generator = torch.Generator().manual_seed(1)
    masks = Masks(
        {
            name: SiteMask(
                torch.rand(batch, context, C, generator=generator), torch.rand(batch, context, generator=generator)
            )
            for name, C in counts.items()
        }
    )
    one = "blocks.1.mlp.W_in"
    eight = [f"{one}:{i}" for i in range(8)]
    eight_sites = [f"{name}:3" for name in list(vpd.sites)[:8]]
    hook = vpd.sites[one].hook_name("component_acts")
    products = _ProductsOnly(models["products"], vpd)
    plain, attached_model = models["plain"], models["attached"]
    with vpd.attach(attached_model, check_weights=False) as attached:

        def masked() -> None:
            with attached.masked(masks):
                attached_model(tokens)

        def ablated(which: list[str]) -> None:
            with attached.ablated(which):
                attached_model(tokens)

        seconds = seconds_in_turn(
            {
                "plain": lambda: plain(tokens),
                "idle": lambda: attached_model(tokens),
                "read_one_site": lambda: attached_model.run_with_cache(tokens, names_filter=hook),
                "ablate_8": lambda: ablated(eight),
                "ablate_8_sites": lambda: ablated(eight_sites),
                "all_masked": masked,
                "all_masked_products_only": lambda: models["products"](tokens),
            },
            rounds=rounds,
            clock=time.process_time,
        )
        x = torch.randn(batch, context, D_MODEL)
        products_in_turn = {"one": lambda: x @ vpd.V[one], "plain": lambda: plain(tokens)}
        product = seconds_in_turn(products_in_turn, rounds=rounds, clock=time.process_time)
    products.remove()
    figures: dict[str, Any] = {name: round(ratio(seconds, name, "plain"), 4) for name in seconds if name != "plain"}
    figures["read_one_site_product_only"] = round(1 + ratio(product, "one", "plain"), 4)
    figures["all_masked_over_products_only"] = round(ratio(seconds, "all_masked", "all_masked_products_only"), 4)
    figures["plain_seconds"] = round(statistics.median(seconds["plain"]), 4)
    return figures


def main() -> None:
    """Measures and writes the record."""
    parser = harness.parser("hooks", __doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.set_num_threads(1)
    sizes = {name: getattr(arguments, name) for name in ("batch", "context", "rounds")}
    record = {**measure(transformer, **sizes), "bridge": measure(bridge, **sizes)}
    harness.write(arguments.out, record, "hooks", layers=LAYERS, d_model=D_MODEL, C="2 * min(d_in, d_out)", **sizes)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
