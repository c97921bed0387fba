"""Tokens per second of the processor in functions that read data, beside the passes that each cannot do without.

    python -m benchmarks.throughput                   # writes benchmarks/results/throughput.json (two minutes of the processor)
    python -m benchmarks.throughput --only harvest    # measures this anew; the rest of the record stays

On the bundled model and decomposition, in turn, medians over rounds, in the processor's seconds, which other work on the machine
changes little:

``importances``    ``causal_importances``; the passes are the model's clean one up to its logits, and Γ
``harvest``        windows and tokens of every subcomponent; the same passes
``long_harvest``   the same of ``LONG`` times as many rows, as new windows become rare
``modes``          ``evaluate`` with its table of modes alone (no attack, no control); the same passes, and one under masks that
                   are there already for each of the eight modes
``dataset_graph``  of ``NODES`` subcomponents; the same passes, one that records gradients, and a backward pass for each of them

``share`` is the time of the passes over a function's, ``share_of_model_and_gamma`` that of the model and Γ alone.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import tl_vpd
from benchmarks import harness
from tl_vpd.analysis import DatasetGraphConfig, HarvestConfig, dataset_graph, harvest
from tl_vpd.analysis.graph.direct import DirectModel
from tl_vpd.evaluation import EvaluationConfig, evaluate
from tl_vpd.evaluation.modes import ROWS
from tl_vpd.forward import MaskedModel
from tl_vpd.masking.masks import constant_masks

BATCH, NODES, LONG = 16, 64, 8
NAMES = ("importances", "harvest", "long_harvest", "modes", "dataset_graph")
MODES = EvaluationConfig(measures=(), budgets=(), controls=False, batch_size=BATCH)
Group = dict[str, Callable[[], object]]


class Uses:
    """What is timed.

    Args:
        rows: of the bundled validation text.
    """

    def __init__(self, rows: int) -> None:
        self.model, self.vpd = tl_vpd.bundled.model(), tl_vpd.bundled.decomposition()
        self.long = tl_vpd.bundled.tokens("validation")[: LONG * rows]
        self.tokens = self.long[:rows]
        mean = self.vpd.causal_importances(self.model, self.tokens[:BATCH]).concatenated.flatten(0, -2).mean(0)
        self.nodes = [str(self.vpd.site_axis.at(int(i))) for i in mean.topk(NODES).indices]

    def tokens_of(self, name: str) -> Tensor:
        """Rows of a function."""
        return self.long if name == "long_harvest" else self.tokens

    @torch.no_grad()
    def model_and_gamma(self, name: str, masked_passes: int = 0, *, logits: bool = True) -> None:
        """The clean pass and Γ, batch by batch, and passes under masks."""
        with MaskedModel(self.vpd, self.model) as masked_model:
            for batch in self.tokens_of(name).split(BATCH):
                inputs = masked_model.clean(batch)[1] if logits else masked_model.inputs(batch)
                g = self.vpd.importances(inputs)
                masks = constant_masks(g, 0.0, self.vpd.site_axis)
                for _ in range(masked_passes):
                    masked_model.masked(batch, masks)

    def gradients(self) -> None:
        """A pass that records gradients, and a backward pass for each node in the input of its site."""
        sites = [self.vpd.subcomponent(node).site for node in self.nodes]
        with DirectModel(self.vpd, self.model) as direct:
            for batch in self.tokens.split(DatasetGraphConfig().batch_size):
                run = direct.direct(batch, until=set(sites))
                for site in sites:
                    x, names = run.inputs[site], direct.names[: direct.names.index(site)]
                    run.gradients([(x, torch.ones_like(x))], names, again=True)

    def group(self, name: str) -> Group:
        """A function and its passes."""
        config = DatasetGraphConfig(absolute=False)
        functions: Group = {
            "importances": lambda: [self.vpd.causal_importances(self.model, rows) for rows in self.tokens.split(BATCH)],
            "harvest": lambda: harvest(self.vpd, self.model, self.tokens, config=HarvestConfig()),
            "long_harvest": lambda: harvest(self.vpd, self.model, self.long, config=HarvestConfig()),
            "modes": lambda: evaluate(self.vpd, self.model, self.tokens, MODES),
            "dataset_graph": lambda: dataset_graph(self.vpd, self.model, self.tokens, self.nodes, config=config),
        }
        passes: Group = {
            "modes": lambda: self.model_and_gamma(name, len(ROWS)),
            "dataset_graph": lambda: (self.model_and_gamma(name), self.gradients()),
        }
        return {
            "function": functions[name],
            "passes": passes.get(name, lambda: self.model_and_gamma(name, logits=False)),
            "model_and_gamma": lambda: self.model_and_gamma(name),
        }


def measured(group: Group, tokens: int, rounds: int) -> dict[str, float]:
    """A function's tokens per second and shares."""
    seconds: dict[str, list[float]] = {name: [] for name in group}
    for i in range(rounds + 1):
        for name, call in group.items():
            start = time.process_time()
            call()
            if i:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    return {
        "tokens_per_cpu_second": round(tokens / statistics.median(seconds["function"])),
        "share": round(harness.ratio(seconds, "passes", "function"), 3),
        "share_of_model_and_gamma": round(harness.ratio(seconds, "model_and_gamma", "function"), 3),
    }


def main() -> None:
    """Measures and writes the record, one function after the other."""
    parser = harness.parser("throughput", __doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=NAMES, nargs="+", help="the others stay as the record has them")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    uses, record = Uses(arguments.rows), harness.read(arguments.out) if arguments.only else {}
    for name in arguments.only or NAMES:
        record[name] = measured(uses.group(name), uses.tokens_of(name).numel(), arguments.rounds)
        ordered = {which: record[which] for which in NAMES if which in record}
        harness.write(arguments.out, ordered, "throughput", tokens=uses.tokens.numel(), rounds=arguments.rounds)
        print(name, record[name], flush=True)


if __name__ == "__main__":
    main()
