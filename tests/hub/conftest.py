"""The Hub of the tests, which ``huggingface_hub`` believes to be the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download

from tests.hub.server import Hub
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import Decomposition, Evaluation, EvaluationConfig, evaluate


def _forget_connections() -> None:
    """Closes the client, which knows from when it was made whether it is offline."""
    from huggingface_hub import utils

    close = getattr(huggingface_hub, "close_session", None) or utils.reset_sessions
    close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub without repositories, an empty cache, and no token."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    for module in (constants, file_download):  # huggingface_hub 0.x copies it
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks LFS
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    _forget_connections()
    yield server
    _forget_connections()
    server.shutdown()
    server.server_close()


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """``login("hf_owner")`` (or ``hf_guest``) sets a token, ``login(None)`` takes it away."""

    def as_user(token: str | None) -> None:
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)

    return as_user


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """``offline()`` is ``HF_HUB_OFFLINE=1``."""

    def switch() -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        _forget_connections()

    return switch


@pytest.fixture
def pushed(hub: Hub, login: Callable[[str | None], None], vpd: Decomposition) -> Decomposition:
    """A decomposition in the public repository ``user/repo``, of which there is a token."""
    login("hf_owner")
    vpd.push_to_hub("user/repo")
    return vpd


@pytest.fixture(scope="session")
def report() -> Evaluation:
    """An evaluation of the tiny model's decomposition: controls, two kinds of attack, future leakage."""
    model = tiny_model()
    measures = ("adversaries", "future_leakage")
    config = EvaluationConfig(measures=measures, budgets=(2,), adversary_budgets=(2,), control_budgets=(2,))
    return evaluate(decomposition_of(model).to(torch.float64), model, some_tokens(shape=(4, 7)), config)
