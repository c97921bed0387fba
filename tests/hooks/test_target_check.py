"""A model with other weights than the decomposed ones is refused by everything that takes both, once per state of its weights."""

from __future__ import annotations

import copy
import gc
import inspect
from types import SimpleNamespace

import pytest
import torch

from tests.analysis.labels.synthetic import firings_where
from tests.marks import needs_hooked_transformer
from tests.tiny import decomposition_of, tiny_model
from tl_vpd import Decomposition, analysis, bundled, evaluation, formats, hooks, viz
from tl_vpd.adapters import adapt
from tl_vpd.analysis import attention
from tl_vpd.components import Components, Fingerprint
from tl_vpd.forward import MaskedModel, target_check

REFUSED = r"This model's weights are not the decomposed ones: \d+ of 12 sites differ, .*vpd\.attach\(model, check_weights=False\)"
Q = "blocks.1.attn.W_Q:31"

ARGUMENTS = {
    "prompts": lambda tokens: tokens,
    "prompt": lambda tokens: tokens[:1],
    "tokens": lambda tokens: tokens,
    "data": lambda tokens: {"other": tokens},
    "layer": lambda tokens: 1,
    "metric": lambda tokens: lambda logits: logits[..., -1, 3] - logits[..., -1, 4],
    "behaviour": lambda tokens: None,
    "nodes": lambda tokens: [Q],
    "labels": lambda tokens: tokens % 2,
    "folder": lambda tokens: "features",
    "model_id": lambda tokens: "tiny",
    "wanted": lambda tokens: None,
    "harvested": lambda tokens: analysis.harvest(bundled.decomposition(), bundled.model(), tokens, [Q]),
    "firings": lambda tokens: firings_where(tokens.numpy(), {Q: tokens.numpy() % 2 == 0}),
    "null": lambda tokens: "shuffled",
}
ATTACHED = {"attachment_of", "pair_ablation_hooks", "ablate_nodes"}
"""Functions that only work on an attached model, or on another function's result."""


def functions():
    """Every public function whose first two arguments are a decomposition and a model, and the names of the others it needs."""
    for room in (hooks, analysis, attention, evaluation, viz, formats):
        for name in room.__all__:
            if name == "save_param_decomp":  # of models of one architecture; has a test of its own
                continue
            function = getattr(room, name)
            if not inspect.isfunction(function) or name in ATTACHED:
                continue
            parameters = list(inspect.signature(function).parameters.values())
            if [p.name for p in parameters[:2]] == ["decomposition", "model"]:
                needed = [p.name for p in parameters[2:] if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
                yield pytest.param(function, needed, id=f"{room.__name__}.{name}")


@pytest.fixture(scope="module")
def folded():
    """The bundled model as TransformerLens processes weights by default, its decomposition, and tokens."""
    model = bundled.model(kind="hooked_transformer")
    tokens = bundled.tokens("validation")[:2, :12]
    clean = model(tokens)
    model.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
    torch.testing.assert_close(model(tokens).log_softmax(-1), clean.log_softmax(-1), rtol=1e-3, atol=1e-3)
    return model, bundled.decomposition(), tokens


@needs_hooked_transformer
@pytest.mark.parametrize(("function", "needed"), list(functions()))
def test_every_function_of_a_decomposition_and_a_model_refuses_other_weights(folded, function, needed):
    model, vpd, tokens = folded
    with pytest.raises(ValueError, match=REFUSED):
        result = function(vpd, model, **{name: ARGUMENTS[name](tokens) for name in needed})
        with result:  # a context manager runs when it is entered
            pass


@needs_hooked_transformer
def test_the_methods_refuse_too_and_an_accepted_model_passes(folded):
    model, _, tokens = folded
    vpd, other = bundled.decomposition(), bundled.decomposition()
    for call in (vpd.causal_importances, vpd.component_acts, vpd.adversarial_masks):
        with pytest.raises(ValueError, match=REFUSED):
            call(model, tokens)
    with pytest.raises(ValueError, match=REFUSED):
        vpd.attach(model)
    vpd.attach(model, check_weights=False).detach()
    assert vpd.causal_importances(model, tokens).concatenated.shape == (2, 12, vpd.site_axis.total)
    with pytest.raises(ValueError, match=REFUSED):  # accepted for that decomposition, not for another
        other.causal_importances(model, tokens)
    with pytest.raises(ValueError, match=REFUSED):  # nor in a copy of the model
        vpd.causal_importances(copy.deepcopy(model), tokens)
    with MaskedModel(other, model, check_weights=False) as masked_model:
        masked_model.clean(tokens)
    with pytest.raises(ValueError, match=REFUSED):
        other.component_acts(model, tokens)


@pytest.fixture
def computed(monkeypatch):
    """The shapes of which fingerprints are computed."""
    shapes = []
    monkeypatch.setattr(
        target_check, "Fingerprint", SimpleNamespace(of=lambda W: shapes.append(W.shape) or Fingerprint.of(W))
    )
    return shapes


def test_fingerprints_are_computed_once_per_state_of_the_weights(model, vpd, tokens, computed):
    other = decomposition_of(model, C=3).double()
    assert computed == []  # the first decomposition of this model has computed them
    for decomposition in (vpd, other):
        decomposition.causal_importances(model, tokens)
        decomposition.adversarial_masks(model, tokens, steps=1)
        with decomposition.attach(model) as attached, attached.masked("ci"):
            model(tokens)
    assert computed == []
    W_in = model.blocks[1].mlp.W_in
    with torch.no_grad():
        W_in.mul_(1.001)  # within the tolerance, but written to
    vpd.component_acts(model, tokens)
    assert len(computed) == 12
    with torch.no_grad():
        W_in.mul_(2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 of 12 sites differ, blocks\.1\.mlp\.W_in by"):
            vpd.component_acts(model, tokens)
    assert len(computed) == 24
    model.blocks[1].mlp.W_in = torch.nn.Parameter(W_in.detach() / 2.002)
    vpd.component_acts(model, tokens)
    assert len(computed) == 36
    model.to(torch.float32)
    vpd.component_acts(model, tokens)
    assert len(computed) == 48


def test_a_model_made_under_inference_mode_is_checked_at_every_call(tokens, computed):
    """Its parameters do not count how often they were written to."""
    with torch.inference_mode():
        model = tiny_model()
        vpd = decomposition_of(tiny_model()).double()
        computed.clear()
        for n in (1, 2):
            vpd.attach(model).detach()
            assert len(computed) == 12 * n
        model.blocks[0].mlp.W_in.mul_(2)
        with pytest.raises(ValueError, match=r"1 of 12 sites differ, blocks\.0\.mlp\.W_in"):
            vpd.attach(model)


def test_no_model_is_kept_alive(vpd):
    model = tiny_model()
    vpd.attach(model, check_weights=False).detach()
    vpd.component_acts(model, torch.tensor([[1, 2]]))
    before = len(target_check._remembered), len(target_check._accepted)
    target_check.fingerprints(adapt(model), vpd.sites)
    assert len(target_check._remembered) == before[0] + 1
    del model
    gc.collect()
    assert len(target_check._remembered) < before[0] + 1 and len(target_check._accepted) < before[1]


def test_bare_components_have_no_fingerprints_to_compare(model, vpd):
    components = Components(list(vpd.sites.values()), vpd.counts)
    target_check.check_target(components, adapt(tiny_model(seed=1)))
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.W_in is 8x16 in this model and 8x12"):
        target_check.check_target(components, adapt(tiny_model(d_mlp=16)))


def test_a_decomposition_from_tensors_knows_its_model(model, vpd, tokens, computed):
    gamma = {name: p.detach() for name, p in vpd.gamma.named_parameters()}
    made = Decomposition.from_tensors(model, vpd.V, vpd.U, vpd.gamma_config, gamma)
    assert made.fingerprints == vpd.fingerprints
    assert torch.equal(
        made.causal_importances(model, tokens).concatenated, vpd.causal_importances(model, tokens).concatenated
    )
    assert computed == []
    with pytest.raises(ValueError, match="12 of 12 sites differ"):
        made.causal_importances(tiny_model(seed=1), tokens)
