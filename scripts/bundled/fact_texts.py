"""Makes the texts of ``tl-vpd fact``: ``python -m scripts.bundled.fact_texts --out build/fact`` (needs the extra ``real``).

Rows of tokens of SmolLM2, each opened by BOS: ``training`` for the non-target stream (24 tokens), and by kind what was not
trained on (32 tokens).
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sysconfig
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tl_vpd.bundled import smollm2

LENGTH, TRAINED_LENGTH, APART = 32, 24, 160
TRAINED = {"Python source": 400, "documentation": 600, "licences": 200, "the model's samples": 352}
"""Rows of each kind for training."""
SAMPLES, AT_ONCE = 512, 64
CAPITALS = """Spain Madrid,Italy Rome,France Paris,Portugal Lisbon,Poland Warsaw,Sweden Stockholm,Norway Oslo,Finland Helsinki,\
Denmark Copenhagen,Austria Vienna,Hungary Budapest,Ireland Dublin,England London,Japan Tokyo,China Beijing,Korea Seoul,\
India Delhi,Russia Moscow,Egypt Cairo,Kenya Nairobi,Cuba Havana,Peru Lima,Canada Ottawa,Iran Tehran,Iraq Baghdad"""
SENTENCES = (
    "The capital of {} is {}.",
    "The capital city of {} is {}.",
    "{} is a country whose capital is {}.",
    "In {}, the capital is {}.",
    "{1} is the capital of {0}.",
    "People travel from {1} to the rest of {0}.",
)


def rows_of(tokenizer: Any, text: str) -> Tensor:
    """Rows of a text, each opened by BOS."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    n = len(ids) // (LENGTH - 1)
    rows = torch.tensor(ids[: n * (LENGTH - 1)]).reshape(n, LENGTH - 1)
    return torch.cat([torch.full((n, 1), tokenizer.bos_token_id), rows], 1)


@torch.no_grad()
def samples(model: Any) -> Tensor:
    """What the model writes after BOS at temperature 1."""
    torch.manual_seed(0)
    start = torch.full((AT_ONCE, 1), model.tokenizer.bos_token_id)
    options = {"do_sample": True, "top_k": 0, "temperature": 1.0, "pad_token_id": model.tokenizer.pad_token_id}
    n = {"max_new_tokens": LENGTH - 1, "min_new_tokens": LENGTH - 1}
    return torch.cat([model.original_model.generate(start, **n, **options) for _ in range(SAMPLES // AT_ONCE)])


def texts(model: Any) -> dict[str, Tensor]:
    """Rows by kind, before they are divided."""
    library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    source = [p.read_text(errors="ignore")[:6000] for p in sorted(library.glob("*.py"))[::2]]
    licences = [p.read_text(errors="ignore")[:4000] for p in sorted(packages.glob("*.dist-info/**/LICENSE*"))[:40]]
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    return {
        "Python source": rows_of(model.tokenizer, "\n".join(source)),
        "documentation": rows_of(model.tokenizer, "\n\n".join(topics)),
        "licences": rows_of(model.tokenizer, "\n".join(licences)),
        "the model's samples": samples(model),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for texts.safetensors")
    options = parser.parse_args()
    model, generator = smollm2(), torch.Generator().manual_seed(0)
    kinds = texts(model)
    sentences = [form.format(*names.split()) for names in CAPITALS.split(",") for form in SENTENCES]
    order = torch.randperm(len(sentences), generator=generator).tolist()
    capitals = rows_of(model.tokenizer, " ".join(sentences[i] for i in order))
    training = [
        rows[:-APART][torch.randperm(len(rows) - APART, generator=generator)[: TRAINED[kind]]]
        for kind, rows in kinds.items()
    ]
    tensors = {"training": torch.cat([*training, capitals, capitals])[:, :TRAINED_LENGTH]}
    trained = {tuple(row) for row in tensors["training"].tolist()}
    for kind, rows in kinds.items():  # licences repeat each other
        new = [row for row in rows if tuple(row[:TRAINED_LENGTH].tolist()) not in trained]
        tensors[kind] = torch.stack(new[-APART:])
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "texts.safetensors"
    save_file({name: rows.to(torch.int32).contiguous() for name, rows in tensors.items()}, file)


if __name__ == "__main__":
    main()
