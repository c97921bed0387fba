"""Transcoders: activations and losses by hand, replacement against hooks, training, thresholds, files."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tests.marks import needs_bridge, needs_hooked_transformer
from tests.tiny import some_tokens, tiny_model
from tl_vpd import bundled
from tl_vpd.baselines.transcoders import (
    ReplacedModel,
    Transcoder,
    TranscoderConfig,
    Transcoders,
    calibrate,
    train_transcoders,
    transcoder_consistency,
)
from tl_vpd.baselines.transcoders.activations import jump_relu, step, top_k_of_batch
from tl_vpd.baselines.transcoders.cost import forward_flops, training_flops
from tl_vpd.baselines.transcoders.losses import revival, sparsity, unexplained
from tl_vpd.baselines.transcoders.replaced_model import clean_outputs
from tl_vpd.baselines.transcoders.training import TranscoderTrainer
from tl_vpd.losses import kl_divergence

CONFIG = TranscoderConfig(n_latents=10, k=2, steps=30, batch_size=4, lr=0.02)


def random_transcoders(*, cross_layer=False, reads="mlp_in", skip=False, n=5, layers=(0, 1), seed=0, threshold=0.3):
    """Of the tiny model, in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    by_layer = {}
    for i, layer in enumerate(layers):
        targets = len(layers) - i if cross_layer else 1
        by_layer[layer] = Transcoder(
            draw(8, n),
            draw(n),
            draw(targets, n, 8),
            draw(8),
            torch.full((n,), threshold).double(),
            draw(8, 8) if skip else None,
        )
    return Transcoders(by_layer, cross_layer=cross_layer, reads=reads)


def exact_transcoders(model):
    """Those whose latents are the neurons of a model with ReLU."""
    by_layer = {}
    for layer, block in enumerate(model.blocks):
        mlp = block.mlp
        by_layer[layer] = Transcoder(mlp.W_in, mlp.b_in, mlp.W_out[None], mlp.b_out, torch.zeros_like(mlp.b_in))
    return Transcoders(by_layer)


# -- activations and losses by hand ------------------------------------------------------------------------------------


def test_jump_relus_gradients_are_those_of_the_formula():
    z = torch.tensor([[0.1, 0.9, 1.1, 1.4], [3.0, 0.8, 1.2, -1.0]], dtype=torch.float64, requires_grad=True)
    threshold = torch.full((4,), 1.0, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]], dtype=torch.float64)
    acts = jump_relu(z, threshold, 0.5)
    assert acts.tolist() == [[0, 0, 1.1, 1.4], [3.0, 0, 1.2, 0]]
    (acts * weights).sum().backward()
    # z passes where it is above; θ gets −θ/ε = −2 from what lies within ε/2 = 0.25 of it: 0.9; 0.8; 1.1; 1.2.
    assert z.grad.tolist() == [[0, 0, 3, 4], [5, 0, 7, 0]]
    assert threshold.grad.tolist() == [0, -2 * (2 + 6), -2 * (3 + 7), 0]


def test_the_step_counts_and_its_gradient_reaches_the_threshold_alone():
    z = torch.tensor([[0.4, 2.0], [0.6, 0.3]], dtype=torch.float64, requires_grad=True)
    threshold = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
    loss = sparsity(z, threshold, 2.0, 0.5)
    assert float(step(z, threshold).detach().sum()) == 2 and float(loss.detach()) == pytest.approx((1 / 2 - 1) ** 2)
    loss.backward()
    # d loss / d L0 = 2 (L0/k − 1) / k = −½; L0's slope is −1/ε = −2 per latent within 0.25, over two tokens.
    assert z.grad is None and threshold.grad.tolist() == [-0.5 * -2 * 2 / 2, -0.5 * -2 * 1 / 2]


def test_the_largest_of_a_batch_are_left_whoevers_they_are_and_padding_has_none():
    z = torch.tensor([[[3.0, -1.0, 2.0], [0.1, 0.2, -5.0]], [[9.0, 8.0, 7.0], [1.0, 0.5, 0.3]]])
    assert top_k_of_batch(z, 1.0).tolist() == [[[3, 0, 0], [0, 0, 0]], [[9, 8, 7], [0, 0, 0]]]
    real = torch.tensor([[True, True], [False, True]])
    left = top_k_of_batch(z, 1.0, real)
    assert left.tolist() == [[[3, 0, 2], [0, 0, 0]], [[0, 0, 0], [1, 0, 0]]]
    assert (top_k_of_batch(z, 3.0) > 0).sum() == 10  # never what is negative


def test_losses_by_hand():
    y, predicted = torch.tensor([[0.0, 0.0], [2.0, 4.0]]), torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    assert float(unexplained(y, predicted)) == pytest.approx((1 + 4) / (2 * 1 + 2 * 4))
    z = torch.tensor([[5.0, -1.0, 2.0], [5.0, 3.0, 1.0]])
    dead, W_dec = torch.tensor([False, True, True]), torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]])
    # The largest dead latent of each token: 2 of the third, 3 of the second; e − ê = (0, −1) − (0, 2), (0, 2) − (3, 0).
    loss = revival(z, dead, W_dec, y - predicted, y, 1)
    assert float(loss) == pytest.approx((9 + 9 + 4) / 10)


# -- replacement -------------------------------------------------------------------------------------------------------


def test_neurons_as_latents_give_the_model_itself_in_every_way():
    model, tokens = tiny_model(normalization_type=None, act_fn="relu"), some_tokens()
    before, transcoders = copy.deepcopy(model.state_dict()), exact_transcoders(model)
    with ReplacedModel(model) as replaced:
        clean = replaced.clean(tokens)
        outputs = clean_outputs(transcoders, clean)
        for output in (
            replaced.error_propagating(transcoders, tokens),
            replaced.with_outputs(tokens, outputs),
            replaced.with_outputs(tokens, {1: outputs[1]}),
        ):
            assert_close(output, clean.output)
    assert torch.equal(clean.output, model(tokens))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and not model.blocks[0].mlp._forward_hooks


@pytest.mark.parametrize("cross_layer", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_replacement_is_what_hooks_on_mlp_outputs_give(cross_layer, skip):
    model, tokens = tiny_model(), some_tokens()
    transcoders = random_transcoders(cross_layer=cross_layer, skip=skip)
    W = {layer: dict(transcoders[layer].named_parameters()) for layer in (0, 1)}

    def by_hand(inputs):
        acts = {}
        for layer in inputs:
            z = inputs[layer] @ W[layer]["W_enc"] + W[layer]["b_enc"]
            acts[layer] = torch.where(z > 0.3, z, 0.0)
        outputs = {}
        for layer in inputs:
            y = acts[layer] @ W[layer]["W_dec"][0] + W[layer]["b_dec"]
            if cross_layer and layer == 1 and 0 in acts:
                y = y + acts[0] @ W[0]["W_dec"][1]
            outputs[layer] = y + inputs[layer] @ W[layer]["W_skip"] if skip else y
        return outputs

    seen = {}

    def note(x, hook, layer):
        seen[layer] = x

    def normed(x, layer):
        ln = model.blocks[layer].ln2
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + ln.eps).sqrt() * ln.w + ln.b

    notes = [(f"blocks.{layer}.hook_resid_mid", partial(note, layer=layer)) for layer in (0, 1)]
    with torch.no_grad(), ReplacedModel(model) as replaced:
        clean_output = clean_outputs(transcoders, replaced.clean(tokens))
        propagating = replaced.error_propagating(transcoders, tokens)
        together, alone = (replaced.with_outputs(tokens, o) for o in (clean_output, {0: clean_output[0]}))
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=notes)
        inputs = {layer: normed(seen[layer], layer) for layer in (0, 1)}
        outputs = by_hand(inputs)
        put = [(f"blocks.{layer}.hook_mlp_out", lambda y, hook, layer=layer: outputs[layer]) for layer in (0, 1)]
        assert_close(together, model.run_with_hooks(tokens, fwd_hooks=put))
        assert_close(alone, model.run_with_hooks(tokens, fwd_hooks=put[:1]))
        so_far = {}

        def as_it_comes(y, hook, layer):
            so_far[layer] = normed(seen[layer], layer)
            return by_hand(so_far)[layer]

        late = [(f"blocks.{layer}.hook_mlp_out", partial(as_it_comes, layer=layer)) for layer in (0, 1)]
        assert_close(propagating, model.run_with_hooks(tokens, fwd_hooks=[*notes, *late]))


def test_an_sae_reads_the_mlps_output_of_its_own_pass():
    model, tokens = tiny_model(), some_tokens()
    sae = random_transcoders(reads="mlp_out", layers=(1,))

    def put(y, hook):
        return sae.decode(1, {1: sae.encode(1, y)}, y)

    with torch.no_grad(), ReplacedModel(model, [1]) as replaced:
        expected = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", put)])
        assert_close(replaced.error_propagating(sae, tokens), expected)
        assert_close(replaced.with_outputs(tokens, clean_outputs(sae, replaced.clean(tokens))), expected)


@pytest.mark.parametrize("flags", [{"gated_mlp": True, "act_fn": "silu"}, {"parallel_attn_mlp": True}])
def test_gated_and_parallel_mlps_are_replaced(flags):
    model, tokens, transcoders = tiny_model(**flags), some_tokens(), random_transcoders()
    with torch.no_grad(), ReplacedModel(model) as replaced:
        outputs = clean_outputs(transcoders, replaced.clean(tokens))
        put = [(f"blocks.{layer}.hook_mlp_out", lambda y, hook, layer=layer: outputs[layer]) for layer in (0, 1)]
        assert_close(replaced.with_outputs(tokens, outputs), model.run_with_hooks(tokens, fwd_hooks=put))


@needs_bridge
@needs_hooked_transformer
def test_a_bridge_is_replaced_as_a_hooked_transformer_is():
    tokens, outputs = bundled.tokens("validation")[:2, :9], []
    transcoders = None
    for kind in ("bridge", "hooked_transformer"):
        model = bundled.model(kind=kind)
        if transcoders is None:
            generator = torch.Generator().manual_seed(0)
            draw = partial(torch.randn, generator=generator)
            transcoders = Transcoders(
                {i: Transcoder(draw(96, 7), draw(7), draw(1, 7, 96), draw(96), torch.ones(7)) for i in (0, 1)}
            )
        with torch.no_grad(), ReplacedModel(model) as replaced:
            outputs.append(replaced.error_propagating(transcoders, tokens))
    assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


def test_users_hooks_are_set_aside_and_come_back():
    model, tokens = tiny_model(), some_tokens()
    model.add_hook("blocks.0.hook_mlp_out", lambda y, hook: y * 0)
    hooked, transcoders = model(tokens), random_transcoders()
    with ReplacedModel(model) as replaced:
        output = replaced.error_propagating(transcoders, tokens)
    model.reset_hooks()
    with ReplacedModel(model) as replaced:
        assert torch.equal(output, replaced.error_propagating(transcoders, tokens))
    model.add_hook("blocks.0.hook_mlp_out", lambda y, hook: y * 0)
    assert torch.equal(model(tokens), hooked)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def rows():
    return some_tokens(1, (16, 10))


def left(model, transcoders, tokens):
    """Unexplained shares and L0 of each layer on the target's own stream."""
    with torch.no_grad(), ReplacedModel(model) as replaced:
        clean = replaced.clean(tokens)
        outputs = clean_outputs(transcoders, clean)
        shares = [float(unexplained(clean.outputs[i].flatten(0, 1), outputs[i].flatten(0, 1))) for i in outputs]
        l0 = [float((transcoders.encode(i, clean.inputs[i]) > 0).double().sum(-1).mean()) for i in outputs]
    return shares, l0


@pytest.mark.parametrize("settings", [{"cross_layer": True}, {"activation": "jump_relu", "threshold_lr": 3.0}])
def test_training_explains_mlp_outputs_with_about_k_latents(model, rows, settings):
    config = CONFIG.model_copy(update={"lr": 0.05, **settings})
    transcoders = train_transcoders(model, rows, config, progress=False)
    shares, l0 = left(model, transcoders, rows)
    assert max(shares) < 0.5 and l0 == pytest.approx([2, 2], abs=0.8)
    assert not any(p.requires_grad for p in transcoders.parameters())


def test_a_skip_connection_explains_what_is_linear_and_seeds_repeat(model, rows):
    config = CONFIG.model_copy(update={"steps": 12})
    plain, again = (train_transcoders(model, rows, config, progress=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))
    config = config.model_copy(update={"skip": True})
    shares, _ = left(model, plain, rows)
    with_skip, _ = left(model, train_transcoders(model, rows, config, progress=False), rows)
    assert max(with_skip) < min(shares)


def test_batch_top_ks_threshold_is_the_mean_of_the_last_batches_smallest(model, rows):
    config = CONFIG.model_copy(update={"lr": 1e-12, "steps": 4, "batch_size": 16})  # nothing moves
    transcoders = train_transcoders(model, rows, config, progress=False)
    with torch.no_grad(), ReplacedModel(model) as replaced:
        clean = replaced.clean(rows)
    for layer in (0, 1):
        z = transcoders[layer].pre_acts(clean.inputs[layer]).flatten()
        assert_close(transcoders[layer].threshold, z.topk(2 * 160).values[-1].expand(10), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("loss", ["cascading", "parallel", "independent"])
def test_end_to_end_losses_are_kls_of_replaced_outputs(model, rows, loss):
    config, tokens = CONFIG.model_copy(update={"loss": loss, "k": 1.0, "n_latents": 4}), rows[:4]
    with ReplacedModel(model) as replaced:
        trainer = TranscoderTrainer(replaced, config, (tokens, None))
        clean = replaced.clean(tokens)
        value = trainer.loss(clean, tokens, None)
        t = trainer.transcoders

        def encode(layer, x):
            z = t[layer].pre_acts(x)
            return torch.where(z >= z.flatten().topk(40).values[-1], z, 0.0)

        target = clean.output.log_softmax(-1)
        outputs = clean_outputs(t, clean, encode=encode)
        expected = {
            "cascading": lambda: [replaced.error_propagating(t, tokens, encode=encode)],
            "parallel": lambda: [replaced.with_outputs(tokens, outputs)],
            "independent": lambda: [replaced.with_outputs(tokens, {j: y}) for j, y in outputs.items()],
        }[loss]()
        kls = torch.stack([kl_divergence(target, output) for output in expected])
        assert_close(value, kls.mean())
        value.backward()
        assert all(t[i].W_enc.grad.abs().sum() > 0 and t[i].W_dec.grad.abs().sum() > 0 for i in (0, 1))
        first = float(value.detach())
        for i in range(6):
            last = trainer.step(i, tokens)
    assert last < first


def test_padding_takes_no_part_in_training(model):
    tokens, other = some_tokens(2, (4, 8)), some_tokens(3, (4, 8))
    real = torch.ones(4, 8, dtype=torch.bool)
    real[:2, 5:] = False
    losses = []
    for rows in (tokens, torch.where(real, tokens, other)):
        with ReplacedModel(model) as replaced:
            trainer = TranscoderTrainer(replaced, CONFIG, (rows, real))
            losses += [[trainer.step(i, rows, real) for i in range(3)]]
            assert trainer.n_tokens == 3 * 26
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_dead_latents_are_revived(model, rows):
    config = CONFIG.model_copy(update={"dead_after": 2, "steps": 4, "n_latents": 4, "k": 1, "revive": 0.5})
    with ReplacedModel(model) as replaced:
        trainer = TranscoderTrainer(replaced, config, (rows, None))
        with torch.no_grad():
            trainer.transcoders[0].b_enc[1] = -1e3  # never active
            trainer.transcoders[0].b_enc[2] = 1e-3
        for i in range(3):
            trainer.step(i, rows)
        assert trainer.inactive_for[0][1] == 3
        clean = replaced.clean(rows)
        plain = TranscoderTrainer(replaced, config.model_copy(update={"revive": 0.0}), (rows, None))
        plain.transcoders.load_state_dict(trainer.transcoders.state_dict())
        y = clean.outputs[0].flatten(0, 1)
        dead = float(trainer.loss(clean, rows, None).detach()) - float(plain.loss(clean, rows, None).detach())
        x = clean.inputs[0]
        left_over = y - plain.transcoders.decode(
            0, {0: top_k_of_batch(trainer.transcoders[0].pre_acts(x), 1.0)}, x
        ).flatten(0, 1)
        # The only dead latent is never above 0: nothing of what is left is explained.
        assert dead == pytest.approx(0.5 / 2 * float(unexplained(y, y - left_over).detach()))


def test_flops_are_those_of_the_products(model):
    # Per layer: 4 products of 8x8, 8x12 and 12x8, scores and mixing over 10 positions; unembedding 8x11.
    clean = 2 * (2 * (4 * 64 + 2 * 96) + 4 * 10 * 8) + 2 * 8 * 11
    assert forward_flops(model, 10) == clean
    encode, decode = 2 * 2 * 8 * 5, 2 * 2 * 5 * 8
    for loss, passes in {"local": 0, "parallel": 1, "independent": 2}.items():
        flops = training_flops(model, random_transcoders(), TranscoderConfig(loss=loss), 10)
        assert flops == clean + passes * 2 * clean + 2 * encode + 3 * decode
    cross = training_flops(model, random_transcoders(cross_layer=True), TranscoderConfig(loss="cascading"), 10)
    assert cross == 3 * clean + 3 * encode + 3 * decode * 3 // 2


# -- thresholds of others, files, consistency --------------------------------------------------------------------------


def test_transcoders_without_thresholds_are_refused_until_they_are_calibrated(model, rows, tmp_path):
    transcoders = random_transcoders(threshold=float("nan"), n=20)
    assert not transcoders.calibrated
    for call in (lambda: transcoders.encode(0, torch.zeros(1, 8).double()), lambda: transcoders.save(tmp_path)):
        with pytest.raises(ValueError, match="threshold"):
            call()
    _, l0 = left(model, calibrate(transcoders, model, rows, 3.0), rows)
    assert l0 == pytest.approx([3.0, 3.0])
    with pytest.raises(ValueError, match=r"k=20: give fewer than the 20 latents of a layer\."):
        calibrate(transcoders, model, rows, 20.0)


def test_what_is_saved_is_loaded(tmp_path):
    transcoders = random_transcoders(cross_layer=True, skip=True)
    transcoders.record["seconds"] = 2.5
    loaded = Transcoders.load(transcoders.save(tmp_path / "t"))
    assert loaded.cross_layer and loaded.record == {"seconds": 2.5} and loaded.layers == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), transcoders.parameters(), strict=True))
    file = tmp_path / "t" / "transcoders.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        Transcoders.load(tmp_path / "t")


def test_consistency_is_1_with_itself_in_any_order_and_chance_is_beside_it():
    one = random_transcoders(cross_layer=True, n=20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    layers = {
        i: Transcoder(one[i].W_enc[:, order] * 3, one[i].b_enc, one[i].W_dec[:, order], one[i].b_dec, one[i].threshold)
        for i in (0, 1)
    }
    table = transcoder_consistency(one, Transcoders(layers, cross_layer=True))
    assert list(table.index) == ["blocks.0.mlp", "blocks.1.mlp", "mean"]
    assert table.loc["mean", ["V", "U", "rank_one"]].tolist() == pytest.approx([1, 1, 1])
    other = transcoder_consistency(one, random_transcoders(cross_layer=True, n=20, seed=5))
    assert other.loc["mean", "V"] == pytest.approx(other.loc["mean", "V_random"], abs=0.1)
    with pytest.raises(ValueError, match="cross-layer"):
        transcoder_consistency(one, random_transcoders())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 11, "n_latents": 10}, r"k=11 latents of n_latents=10 cannot be active: lower k\."),
        ({"layers": ()}, r"layers=\(\): give each layer once, and at least one\."),
        ({"sparsity": 0.2}, "would do nothing"),
        ({"loss": "cascading", "revive": 0.0}, "would do nothing"),
    ],
)
def test_configs_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TranscoderConfig(**settings)


def test_models_without_such_mlps_are_refused(rows):
    with pytest.raises(ValueError, match="has no MLP that a transcoder can replace"):
        ReplacedModel(tiny_model(attn_only=True))
    with pytest.raises(ValueError, match=r"has no MLP in layer 5 of layers=\[5\] .* the layers are \[0, 1\]\."):
        train_transcoders(tiny_model(), rows, CONFIG.model_copy(update={"layers": (5,)}), progress=False)
    with pytest.raises(ValueError, match=r"layer 0 is 8 -> 12, and this model's layer is 8 -> 8"):
        wrong = Transcoder(torch.ones(8, 2), torch.ones(2), torch.ones(1, 2, 12), torch.ones(12), torch.ones(2))
        ReplacedModel(tiny_model()).check(Transcoders({0: wrong}).double())
    with pytest.raises(ValueError, match=r"in torch.float32 on cpu, the model in torch.float64 .* use transcoders.to"):
        ReplacedModel(tiny_model()).check(random_transcoders().float())


def test_tensors_that_do_not_fit_each_other_are_refused():
    good = dict(random_transcoders()[0].named_parameters())
    with pytest.raises(ValueError, match=r"b_enc is \(4,\): \(5,\) fits"):
        Transcoder(**{**good, "b_enc": torch.zeros(4)})
    with pytest.raises(ValueError, match="W_enc has 1 of 40 entries that are NaN"):
        W_enc = good["W_enc"].clone()
        W_enc[0, 0] = float("nan")
        Transcoder(**{**good, "W_enc": W_enc})
    with pytest.raises(ValueError, match="Layer 0 has 1 decoders, and its latents write to 2 layers"):
        Transcoders({i: Transcoder(**good) for i in (0, 1)}, cross_layer=True)
    with pytest.raises(KeyError, match="Layer 7 has no transcoder"):
        random_transcoders()[7]
