"""Every Python block of README and docs runs as it stands, from the top of its page to the bottom in one namespace.

Trainings are cut to two steps of two rows, so that a page costs seconds; nothing else is changed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import tl_vpd
from tl_vpd.adapters.versions import HookedTransformer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The first line and the text of every Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text[: match.start(1)].count("\n"), match[1]) for match in BLOCK.finditer(text)]


@pytest.fixture
def short_trainings(monkeypatch):
    """``decompose``, ``decompose_targeted`` and ``train_transcoders`` with two steps of two rows."""
    decompose, decompose_targeted = tl_vpd.decompose, tl_vpd.decompose_targeted

    def short(model, tokens, config=None, **options):
        rows = getattr(tokens, "batch_size", 2)  # of data that makes batches itself
        config = (config or tl_vpd.VPDConfig()).model_copy(update={"steps": 2, "batch_size": rows, "C": 4})
        return decompose(model, tokens, config, **{**options, "progress": False})

    def short_targeted(model, target, nontarget, config, **options):
        changes = {"steps": 2, "batch_size": 2, "nontarget_batch_size": 2, "C": 4}
        return decompose_targeted(
            model, target, nontarget, config.model_copy(update=changes), progress=False, **options
        )

    train_transcoders = tl_vpd.baselines.train_transcoders

    def short_transcoders(model, tokens, config):
        config = config.model_copy(update={"steps": 2, "batch_size": 2})
        return train_transcoders(model, tokens, config, progress=False)

    monkeypatch.setattr(tl_vpd.baselines, "train_transcoders", short_transcoders)
    monkeypatch.setattr(tl_vpd, "decompose", short)
    monkeypatch.setattr(tl_vpd, "decompose_targeted", short_targeted)


@pytest.mark.skipif(
    HookedTransformer is None, reason="the pages speak of HookedTransformer, which TransformerLens 4 does not have"
)
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.stem)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch, short_trainings):
    monkeypatch.chdir(tmp_path)
    grad = torch.is_grad_enabled()
    namespace: dict[str, object] = {"__name__": "page"}
    for line, text in blocks(page):
        exec(compile("\n" * line + text, str(page), "exec"), namespace)
    assert torch.is_grad_enabled() == grad


def test_every_page_is_in_the_navigation_of_the_site_once():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    made = {"developers.md", "changes.md"}
    assert sorted(re.findall(r"\b\w+\.md", navigation)) == sorted({p.name for p in PAGES[1:]} | made)


def test_every_page_is_linked_from_the_readme_or_another_page():
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for page in PAGES[1:]:
        assert any(page.name in text for other, text in texts.items() if other != page), page.name
