"""Is the bundled model worth decomposing? Three measures on validation windows.

Against an interpolated Kneser–Ney trigram of the same training text; how much cheaper a name is the second time than the
first; and whether the right one of ``)``, ``]``, ``}`` is preferred where one closes a bracket opened in the window.

Run ``python -m scripts.bundled.quality`` (it rebuilds the training text for the trigram).
"""

from __future__ import annotations

import argparse
import json
import keyword
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from scripts.bundled import corpus
from scripts.bundled.ngram import KneserNeyTrigram
from tl_vpd import bundled

PAIRS = {")": "(", "]": "[", "}": "{"}


def trigram_ce(trigram: KneserNeyTrigram, tokens: Int[np.ndarray, "n pos"]) -> float:
    """The trigram's mean cross-entropy on the windows' next tokens, in nats (its first context word is BOS)."""
    first = tokens[:, :1]
    padded = np.concatenate([first, tokens], axis=1)
    contexts = np.stack([padded[:, :-2], padded[:, 1:-1]], axis=-1)
    return float(-trigram.log_probability(contexts.reshape(-1, 2), padded[:, 2:].reshape(-1)).mean())


def name_costs(losses: Float[np.ndarray, "n pos"], pieces: list[list[str]]) -> tuple[float, float, int]:
    """Mean nats of a name at its first and at its second occurrence in a window, and over how many names.

    A name is an identifier that is not a keyword; its cost is the sum over its tokens. ``losses[i, t]`` is the cost of token t
    of window i, and ``pieces[i][t]`` that token's text.
    """
    first, second = [], []
    for row, texts in zip(losses, pieces, strict=True):
        ends = np.cumsum([len(t) for t in texts])
        by_name: dict[str, list[float]] = {}
        for match in corpus.NAME.finditer("".join(texts)):
            if keyword.iskeyword(match.group()):
                continue
            start, stop = np.searchsorted(ends, [match.start(), match.end() - 1], side="right")
            if start > 0:  # the window's first token is not predicted
                by_name.setdefault(match.group(), []).append(float(row[start : stop + 1].sum()))
        for costs in by_name.values():
            if len(costs) > 1:
                first.append(costs[0])
                second.append(costs[1])
    return float(np.mean(first)), float(np.mean(second)), len(first)


def bracket_accuracy(
    logits: Float[Tensor, "n pos vocab"], pieces: list[list[str]], closers: dict[str, int]
) -> tuple[float, int]:
    """How often the right closing bracket has the highest logit of the three where one closes, and over how many."""
    columns = list(closers)
    best = logits[..., list(closers.values())].argmax(-1)
    right = total = 0
    for i, texts in enumerate(pieces):
        stack: list[str] = []
        for t, text in enumerate(texts):
            bracket = text.strip()
            if bracket in PAIRS.values():
                stack.append(bracket)
            elif bracket in PAIRS and stack and stack.pop() == PAIRS[bracket] and t > 0:
                total += 1
                right += columns[int(best[i, t - 1])] == bracket
    return right / total, total


def measure(folder: Path, root: Path | None = None) -> dict[str, float]:
    """All three measures of the model in ``folder`` on its validation windows."""
    model = bundled.model(folder=folder)
    held_out = bundled.tokens("validation", folder)
    assert model.tokenizer is not None
    with torch.no_grad():
        logits = model(held_out)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), held_out[:, 1:], reduction="none")
    pieces = [[str(model.tokenizer.decode([t])) for t in row] for row in held_out.tolist()]
    for row in pieces:
        row[0] = "\n"  # BOS
    closers = {b: int(model.tokenizer.encode(b, add_special_tokens=False)[0]) for b in PAIRS}
    padded = np.concatenate([np.zeros((len(losses), 1)), losses.numpy()], axis=1)
    first, second, names = name_costs(padded, pieces)
    accuracy, brackets = bracket_accuracy(logits, pieces, closers)
    training, _ = corpus.split(corpus.files(root))
    stream = corpus.token_stream(corpus.load_tokenizer(folder), training)
    trigram = trigram_ce(KneserNeyTrigram(stream, model.cfg.d_vocab), held_out.numpy())
    return {
        "validation_ce": float(losses.mean()),
        "trigram_ce": trigram,
        "name_first_nats": first,
        "name_second_nats": second,
        "names": names,
        "bracket_accuracy": accuracy,
        "brackets": brackets,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=bundled.MODEL)
    arguments = parser.parse_args()
    result = measure(arguments.folder)
    (arguments.folder / "quality.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
