"""Edits in the weights of every class of model: the logits of the context, all or nothing, and undone to the bit."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
from torch.testing import assert_close

from tests.editing.conftest import OUT, WO, Q
from tests.marks import needs_bridge, needs_hooked_transformer
from tests.matrix.families import FAMILIES
from tests.matrix.models import PROCESSING, bridge, build, hooked_transformer, plain
from tests.matrix.models import tokens as family_tokens
from tests.tiny import ARCHITECTURES, decomposition_of, draw, tiny_model
from tl_vpd import VPDConfig
from tl_vpd.adapters.plain import PlainWeights
from tl_vpd.editing import Edit, bake, remove, scale, write_direction
from tl_vpd.training import new_decomposition

FUSED_AND_PLAIN = [name for name, family in FAMILIES.items() if family.config is not None]
GAMMA = dict(d_ci=8, n_blocks=1, n_heads=2)


def every_site(vpd) -> Edit:
    """An edit of every weight of the first block."""
    names = [name for name in vpd.sites if name.startswith("blocks.0.")]
    return scale(vpd, [f"{name}:{i % 3}" for i, name in enumerate(names)], -2.0)


def decomposition(model):
    return new_decomposition(model, VPDConfig(C=3, gamma=GAMMA)).double()


def state(model) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(model, before) -> bool:
    return all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["layernorm", "rms, gated, grouped", "folded norm", "attention only"])
def test_logits_are_the_contexts_and_undo_is_exact(name, tokens):
    model = tiny_model(**ARCHITECTURES[name])
    vpd = decomposition_of(model).double()
    edit, before = every_site(vpd), state(model)
    with vpd.attach(model) as attached, attached.edited(edit):
        expected = model(tokens)
    baked = bake(edit, model)
    assert not same(model, before) and set(baked.changed) == set(edit.sites)
    assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)
    checkpoint = tiny_model(**ARCHITECTURES[name], seed=9)
    checkpoint.load_state_dict(model.state_dict())  # an ordinary checkpoint
    assert torch.equal(checkpoint(tokens), model(tokens))
    baked.undo()
    assert same(model, before)
    with pytest.raises(RuntimeError, match="it has been undone"):
        baked.undo()
    with vpd.attach(model):
        pass


def test_in_float32_and_bfloat16(tokens):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        model = tiny_model(dtype=dtype)
        vpd = decomposition_of(model)
        edit, before = scale(vpd, f"{OUT}:1", 0.5), state(model)
        with vpd.attach(model) as attached, attached.edited(edit):
            expected = model(tokens)
        baked = bake(edit, model)
        assert_close(model(tokens), expected, rtol=tolerance, atol=tolerance)
        baked.undo()
        assert same(model, before)


@needs_hooked_transformer
@pytest.mark.parametrize("family", FUSED_AND_PLAIN)
def test_the_model_of_transformers_gets_what_its_hooked_transformer_gets(family):
    """Fused, transposed, grouped and interleaved weights, without any processing."""
    source = plain(FAMILIES[family], "HookedTransformer", torch.float64)
    model = hooked_transformer(FAMILIES[family], torch.float64, None, source)
    vpd, tokens = decomposition(model), family_tokens()
    plain_weights = PlainWeights(source)
    assert set(plain_weights.places) == set(vpd.sites)
    before = state(source)
    with torch.no_grad():
        assert_close(model(tokens).log_softmax(-1), source(tokens).logits.log_softmax(-1), rtol=1e-6, atol=1e-6)
        baked = bake(every_site(vpd), source)
        bake(every_site(vpd), model)
        assert_close(model(tokens).log_softmax(-1), source(tokens).logits.log_softmax(-1), rtol=1e-6, atol=1e-6)
    baked.undo()
    assert same(source, before)


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["GPT-2", "GPT-NeoX", "OPT", "Llama", "Qwen2", "Gemma-2"])
def test_folded_norms_centring_and_value_biases_are_translated_back(family):
    source = plain(FAMILIES[family], "HookedTransformer", torch.float64)
    processing = dict.fromkeys(PROCESSING, True)
    rms = FAMILIES[family].hooked["normalization_type"] == "RMS"
    if rms:
        processing.update(center_writing_weights=False, center_unembed=False)
    model = hooked_transformer(FAMILIES[family], torch.float64, processing, source)
    vpd, tokens = decomposition(model), family_tokens()
    edit, whole = every_site(vpd), every_site(vpd)
    if family == "Qwen2":  # value biases and no b_O that could take them back
        with pytest.raises(ValueError, match=r"value biases folded into b_O, which this model does not have\.$"):
            bake(whole, source)
        edit = Edit.of(vpd, [piece for piece in whole.pieces if not piece.site.endswith("W_O")])
    with torch.no_grad():
        with vpd.attach(model) as attached, attached.edited(edit):
            expected = model(tokens).log_softmax(-1)
        assert float((expected - model(tokens).log_softmax(-1)).abs().max()) > 1e-2
        baked = bake(edit, source)
        assert_close(source(tokens).logits.log_softmax(-1), expected, rtol=1e-6, atol=1e-6)
        assert any(name.startswith("the bias of") for name in baked.changed) == (not rms)
        with pytest.raises(ValueError, match="has this edit already"):
            bake(edit, copy.deepcopy(source))


@needs_hooked_transformer
def test_what_cannot_be_translated_back_is_refused_by_name():
    source = plain(FAMILIES["GPT-2"], "HookedTransformer", torch.float64)
    with torch.no_grad():
        source.transformer.h[0].ln_2.weight[3] = 0.0
    model = hooked_transformer(FAMILIES["GPT-2"], torch.float64, dict.fromkeys(PROCESSING, True), source)
    vpd, before = decomposition(model), state(source)
    with pytest.raises(
        ValueError, match=r"blocks.0.mlp.W_in was decomposed with its norm folded in, .* scale is 0 at 1 dim"
    ):
        bake(scale(vpd, ["blocks.0.attn.W_Q:0", "blocks.0.mlp.W_in:0"], 2.0), source)
    vpd.record["target"]["processing"].pop("fold_value_biases")
    with pytest.raises(ValueError, match=r"Whether blocks.0.attn.W_O was decomposed with value biases folded"):
        bake(scale(vpd, ["blocks.0.attn.W_Q:0", "blocks.0.attn.W_O:0"], 2.0), source)
    assert same(source, before)
    with torch.no_grad():
        source.transformer.h[0].mlp.c_proj.weight += 0.3 * draw(24, 16)
    with pytest.raises(
        ValueError, match="is not the decomposed weight, neither as it is stored nor with norms folded in"
    ):
        bake(remove(vpd, "blocks.0.mlp.W_out:0"), source)


def test_an_architecture_without_known_weights_is_refused():
    import transformers

    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11)
    model = tiny_model()
    edit = remove(decomposition_of(model).double(), f"{OUT}:0")
    with pytest.raises(
        ValueError, match=r"A T5Model \(model_type='t5'\) has no weights that are known .* known are llama"
    ):
        bake(edit, transformers.T5Model(config))


@needs_bridge
@pytest.mark.parametrize("kind", ["bridge", "compatible"])
@pytest.mark.parametrize("family", ["GPT-2", "GPT-NeoX", "Llama"])
def test_a_bridge(family, kind):
    model = build(family, kind)
    vpd, tokens = decomposition(model), family_tokens()
    edit, before = every_site(vpd), state(model)
    with torch.no_grad():
        with vpd.attach(model) as attached, attached.edited(edit):
            expected = model(tokens)
        baked = bake(edit, model)
        assert_close(model(tokens), expected, rtol=1e-9, atol=1e-9)
        baked.undo()
    assert same(model, before)


@needs_bridge
def test_a_saved_checkpoint_of_transformers_is_the_bridge_with_the_edit(tmp_path):
    """Decomposed as a bridge, baked into the model of transformers, saved and loaded as an ordinary one."""
    import transformers

    family = FAMILIES["GPT-2"]
    source = plain(family, "bridge", torch.float64)
    model = bridge(family, "bridge", torch.float64, None, copy.deepcopy(source))
    vpd, tokens = decomposition(model), family_tokens()
    edit = every_site(vpd)
    with torch.no_grad():
        with vpd.attach(model) as attached, attached.edited(edit):
            expected = model(tokens)
        bake(edit, source)
        source.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert_close(loaded(tokens).logits, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="has this edit already"):
        bake(edit, loaded)


def test_refused_and_untouched(model, vpd, tokens):
    edit, before = remove(vpd, f"{OUT}:2"), state(model)
    other = tiny_model(seed=3)
    with pytest.raises(ValueError, match=f"{OUT} of this model is not the decomposed weight: it differs by"):
        bake(edit, other)
    with vpd.attach(model), pytest.raises(ValueError, match="A decomposition is attached to this model"):
        bake(edit, model)
    with pytest.raises(ValueError, match=rf"{OUT} is \(16, 8\) in this model and \(12, 8\) in the edit"):
        bake(edit, tiny_model(d_mlp=16))
    with pytest.raises(ValueError, match=r"has no blocks.1.mlp.W_out: the edit is of another model"):
        bake(edit, tiny_model(n_layers=1))
    with pytest.raises(ValueError, match=r"would have values beyond torch.float16: nothing was written"):
        bake(scale(vpd, f"{OUT}:2", 1e9), tiny_model(dtype=torch.float16))
    assert same(model, before)
    baked = bake(edit, model)
    with pytest.raises(ValueError, match="has an edit in its weights already"):
        bake(remove(vpd, f"{OUT}:3"), model)
    with pytest.raises(ValueError, match="has this edit already"):
        bake(edit, copy.deepcopy(model))
    with torch.no_grad():
        model.blocks[1].mlp.W_out[0, 0] += 1e-9
    with pytest.raises(ValueError, match="has changed since the edit was baked"):
        baked.undo()


def test_the_inverse_restores_a_copy_to_rounding(model, vpd, tokens):
    edit, clean = write_direction(vpd, f"{WO}:1", draw(8)) + remove(vpd, f"{Q}:0"), model(tokens)
    bake(edit, model)
    loaded = copy.deepcopy(model)
    bake(edit.inverse(), loaded, check_weights=False)
    assert_close(loaded(tokens), clean, rtol=1e-10, atol=1e-10)


def test_all_or_nothing_after_an_error_or_ctrl_c(model, vpd, monkeypatch):
    edit, before = every_site(vpd), state(model)
    module = __import__("tl_vpd.editing.bake", fromlist=["Slot"])
    write_all, calls = module._write_all, []

    def failing(edit, model, slots, undo):
        broken = slots[2]

        def write(values):
            calls.append(1)
            if values is broken.after:
                raise OSError("no more")
            broken_write(values)

        broken_write = broken.write
        object.__setattr__(broken, "write", write)
        write_all(edit, model, slots, undo)

    monkeypatch.setattr(module, "_write_all", failing)
    with pytest.raises(OSError, match="no more"):
        bake(edit, model)
    assert len(calls) == 2 and same(model, before)

    def interrupted(edit, model, slots, undo):
        write_all(edit, model, slots[:2], undo)
        signal.raise_signal(signal.SIGINT)
        write_all(edit, model, slots[2:], undo)

    monkeypatch.setattr(module, "_write_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bake(edit, model)
    assert same(model, before)
    monkeypatch.setattr(module, "_write_all", write_all)
    bake(edit, model).undo()
    assert same(model, before)
