"""Linear layers inside any HookedRootModule, with positions and without."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tl_vpd
from tests.tiny import draw, options_of
from tl_vpd.adapters import adapt
from tl_vpd.forward import MaskedModel
from tl_vpd.hooks.attached import KINDS
from tl_vpd.importance import lower_leaky
from tl_vpd.losses import squared_error
from tl_vpd.masking import Masks, SiteMask

from .custom_models import MLPS, SITE_MLPS, TRANSFORMER, Wrapped, normal, seeded, two_layers, untrained

FC, OUT = "fc", "head.out"
INPUTS = {"no positions": (3, 4), "positions": (2, 5, 4)}


@pytest.fixture(params=INPUTS)
def x(request):
    return normal(*INPUTS[request.param])


@pytest.fixture(params=[TRANSFORMER, MLPS, SITE_MLPS], ids=["transformer", "mlps", "site mlps"])
def case(request):
    model = two_layers()
    return model, untrained(model, gamma=request.param)


def by_hand(model, vpd, x, masks):
    """Both layers with Δ formed; masks are (mask, delta) by site."""

    def linear(x, name, layer):
        m, d = masks[name]
        V, U, W = vpd.V[name], vpd.U[name], layer.weight.T
        out = ((x @ V) * m) @ U + d[..., None] * (x @ (W - V @ U))
        return out if layer.bias is None else out + layer.bias

    return linear(linear(x, FC, model.fc).relu(), OUT, model.head.out)


def some_masks(vpd, shape):
    return {n: (draw(*shape, c, seed=i), draw(*shape, seed=9 + i)) for i, (n, c) in enumerate(vpd.counts.items())}


def test_sites_bear_the_layers_paths_and_weights_are_read_and_written():
    model = two_layers()
    adapter = adapt(model)
    assert [(s.name, s.d_in, s.d_out, s.n_heads) for s in adapter.sites.values()] == [
        (FC, 4, 6, None),
        (OUT, 6, 3, None),
    ]
    assert adapter.d_model == 6 and adapter.dtype == torch.float64
    assert torch.equal(adapter.weight(OUT), model.head.out.weight.T)
    W = draw(6, 3)
    adapter.set_weight(OUT, W)
    assert torch.equal(model.head.out.weight, W.T) and adapter.bias(OUT) is None
    assert torch.equal(adapter.bias(FC), model.fc.bias)
    with pytest.raises(ValueError, match=r"head\.out is 6x3, and the matrix is \(3, 6\)"):
        adapter.set_weight(OUT, W.T)
    table = tl_vpd.sites(model).set_index("site")
    assert table.d_in.to_dict() == {FC: 4, OUT: 6} and (table.refused == "").all() and table["rank"][OUT] == 3


def test_ones_and_rest_change_no_bit_and_everything_is_taken_off(case, x):
    model, vpd = case
    clean, plain = model.run_with_cache(x)
    names, modules = set(model.hook_dict), [n for n, _ in model.named_modules()]
    with vpd.attach(model) as attached:
        assert torch.equal(model(x), clean)
        logits, cache = model.run_with_cache(x)
        assert torch.equal(logits, clean) and torch.equal(cache["hook_hidden"], plain["hook_hidden"])
        assert set(cache) - set(plain) == {f"{n}.hook_{kind}" for n in (FC, OUT) for kind in KINDS}
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context(), attached.masked("unmasked", delta=1.0):
                assert torch.equal(model(x.clone()), clean)
    assert set(model.hook_dict) == names and [n for n, _ in model.named_modules()] == modules
    assert "forward" not in vars(model) and not any(m._forward_hooks for m in model.modules())
    assert torch.equal(model(x), clean)


def test_masks_are_the_formula_and_constant_ones_an_edited_weight(case, x):
    model, vpd = case
    site_masks = some_masks(vpd, x.shape[:-1])
    masks = Masks({n: SiteMask(m, d) for n, (m, d) in site_masks.items()})
    with torch.no_grad(), vpd.attach(model) as attached:
        expected = by_hand(model, vpd, x, site_masks)
        with attached.masked(masks):
            assert_close(model(x), expected, rtol=1e-10, atol=1e-11)
        assert_close(model.run_with_hooks(x, fwd_hooks=vpd.mask_hooks(masks)), expected, rtol=1e-10, atol=1e-11)
        with MaskedModel(vpd, model) as masked_model:
            assert_close(masked_model.masked(x, masks), expected, rtol=1e-10, atol=1e-11)
        m, d = draw(5, seed=3), torch.tensor(0.3, dtype=torch.float64)
        edited = copy.deepcopy(two_layers())
        for name in (FC, OUT):
            W = adapt(edited).weight(name)
            V, U = vpd.V[name], vpd.U[name]
            adapt(edited).set_weight(name, V @ torch.diag(m) @ U + 0.3 * (W - V @ U))
        with attached.masked(Masks({n: SiteMask(m, d) for n in (FC, OUT)})):
            assert_close(model(x), edited(x), rtol=1e-10, atol=1e-10)


def test_importances_are_gammas_of_both_inputs_and_each_row_is_its_own(case, x):
    model, vpd = case
    ci = vpd.causal_importances(model, x)
    inputs = {FC: x, OUT: model.fc(x).relu()}
    assert ci.concatenated.shape == (*x.shape[:-1], 10) and 0 < float((ci.concatenated > 0).double().mean()) < 1
    assert_close(ci.concatenated, lower_leaky(vpd.pre_sigmoid(inputs, None)), rtol=1e-12, atol=1e-12)
    assert ci[OUT].shape == (*x.shape[:-1], 5) and ci.token_mask is None and ci.tokens is x
    assert_close(vpd.causal_importances(model, x[:1]).concatenated, ci.concatenated[:1], rtol=1e-10, atol=1e-12)
    acts = vpd.component_acts(model, x)
    with torch.no_grad(), vpd.attach(model) as attached:
        _, cache = model.run_with_cache(x)
        for n in (FC, OUT):
            assert_close(cache[f"{n}.hook_ci"], ci[n], rtol=1e-10, atol=1e-12)
            assert_close(cache[f"{n}.hook_component_acts"], inputs[n] @ vpd.V[n], rtol=1e-12, atol=1e-12)
            assert torch.equal(acts[n], cache[f"{n}.hook_component_acts"])
            assert cache[f"{n}.hook_mask"].shape == (*x.shape[:-1], 5)
        with attached.masked("zero"):
            assert torch.equal(vpd.causal_importances(model, x).concatenated, ci.concatenated)


def test_every_mode_is_the_formula_under_its_masks(case, x):
    model, vpd = case
    ci = vpd.causal_importances(model, x)
    with torch.no_grad(), vpd.attach(model) as attached:
        for mode in ("unmasked", "stochastic", "rounded", "ci", "zero"):
            site_masks = {
                n: (m.mask, m.delta) for n, m in ci.masks(mode, **options_of(mode, seed=2, threshold=0.2)).items()
            }
            with attached.masked(mode, **options_of(mode, seed=2, threshold=0.2)):
                assert_close(model(x), by_hand(model, vpd, x, site_masks), rtol=1e-9, atol=1e-10, msg=mode)


def test_the_adversary_attacks_the_squared_error(case, x):
    model, vpd = case
    with torch.no_grad(), vpd.attach(model) as attached:
        clean = model(x)

        def error(mode, **how):
            with attached.masked(mode, **how):
                return float(squared_error(clean.float(), model(x)))

        chance = [error("stochastic", seed=s) for s in range(8)]
        attacked = error("adversarial", seed=0, steps=10)
        assert attacked > max(chance) and attacked > error("adversarial", seed=0, steps=1, step_size=1e-9)
        with attached.masked("adversarial", seed=3, steps=4):
            expected = model(x)
        result = vpd.adversarial_masks(model, x, seed=3, steps=4)
        with attached.masked(result):
            assert_close(model(x), expected, rtol=1e-9, atol=1e-10)
        with attached.keep_only([f"{FC}:0"], rest="adversarial", seed=3, steps=4):
            expected = model(x)
        with attached.masked(vpd.adversarial_masks(model, x, node_set=f"{FC}:0", seed=3, steps=4)):
            assert_close(model(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("values", [False, True])
def test_ablations_and_patches_act(case, x, values):
    model, vpd = case
    given = vpd.component_acts(model, x).mean() if values else None
    with torch.no_grad(), vpd.attach(model) as attached:
        clean, cache = model.run_with_cache(x)
        acts = cache[f"{OUT}.hook_component_acts"]
        for dense in ([], [(f"{OUT}.hook_mask", lambda m, hook: None)]):
            with attached.ablated([f"{OUT}:1", f"{OUT}:3"], values=given, amount=0.5):
                got = model.run_with_hooks(x, fwd_hooks=dense)
            to = torch.zeros(5, dtype=torch.float64) if given is None else given[OUT]
            change = sum((to[c] - acts[..., c, None]) * vpd.U[OUT][c] for c in (1, 3))
            assert_close(got, clean + 0.5 * change, rtol=1e-10, atol=1e-11)

        def add(acts, hook):
            return acts + 1.5 * torch.eye(5, dtype=torch.float64)[2]

        patched = model.run_with_hooks(x, fwd_hooks=[(f"{OUT}.hook_component_acts", add)])
        assert_close(patched, clean + 1.5 * vpd.U[OUT][2], rtol=1e-10, atol=1e-11)
        without = model.run_with_hooks(x, fwd_hooks=vpd.delta_hooks(0.0, sites=OUT))
        assert_close(without, acts @ vpd.U[OUT], rtol=1e-10, atol=1e-11)


def test_gradients_reach_v_u_masks_and_not_the_model(case, x):
    model, vpd = case
    site_masks = some_masks(vpd, x.shape[:-1])
    leaves = [t.requires_grad_() for pair in site_masks.values() for t in pair]
    leaves += [p for n in (FC, OUT) for p in (vpd.V[n], vpd.U[n])]
    masks = Masks({n: SiteMask(m, d) for n, (m, d) in site_masks.items()})
    with vpd.attach(model) as attached, attached.masked(masks):
        got = torch.autograd.grad(model(x).square().sum(), leaves)
    expected = torch.autograd.grad(by_hand(model, vpd, x, site_masks).square().sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert all(p.grad is None for p in model.parameters())


def test_positions_are_asked_for_only_where_there_are_some():
    model = two_layers()
    vpd, x = untrained(model), normal(3, 4)
    values = {FC: torch.zeros(5)}
    with torch.no_grad(), vpd.attach(model) as attached:
        for hooks in (
            vpd.ablation_hooks(f"{FC}:1", pos=1),
            vpd.ablation_hooks([f"{FC}:{i}" for i in range(4)], pos=1),
            vpd.ablation_hooks(f"{FC}:1", pos=[0], values=values),
            vpd.delta_hooks(0.0, pos=1),
        ):
            with pytest.raises(IndexError, match=r"needs positions, and .*hook_.* has none"):
                model.run_with_hooks(x, fwd_hooks=hooks)
        for mode in ("zero", "rounded"):
            with pytest.raises(IndexError, match="needs positions"), attached.masked(mode, pos=1):
                model(x)


def test_tables_of_inputs_without_and_with_positions():
    model = two_layers()
    vpd = untrained(model)
    ci = vpd.causal_importances(model, normal(3, 4))
    table = ci.to_pandas(above=0.2)
    assert list(table.columns) == ["batch", "subcomponent", "ci"] and len(table) == int((ci.concatenated > 0.2).sum())
    row = table.iloc[1]
    site, index = row.subcomponent.split(":")
    assert float(ci[site][row.batch, int(index)]) == row.ci
    assert torch.equal(ci.l0, (ci.concatenated > 0).sum(-1)) and ci.l0.shape == (3,)
    top = ci.top(2)
    assert top.mean_ci.tolist() == pytest.approx(ci.concatenated.mean(0).topk(2).values.tolist())
    ci = vpd.causal_importances(model, normal(2, 5, 4))
    table = ci.to_pandas()
    assert list(table.columns) == ["batch", "pos", "subcomponent", "ci"] and len(table) == int(
        (ci.concatenated > 0).sum()
    )
    assert ci.l0.shape == (2, 5) and len(ci.top(3)) == 3
    assert vpd.component_acts(model, normal(3, 4)).mean()[FC].shape == (5,)


def test_a_model_that_reads_tokens_has_them_in_the_table():
    model = seeded(lambda: Wrapped(lambda s, t: s.fc(s.embed(t)), embed=nn.Embedding(7, 4), fc=nn.Linear(4, 3)))
    vpd, tokens = untrained(model), torch.tensor([[1, 5, 2], [0, 6, 3]])
    table = vpd.causal_importances(model, tokens).to_pandas()
    assert list(table.columns) == ["batch", "pos", "token", "subcomponent", "ci"]
    assert all(tokens[r.batch, r.pos] == r.token for r in table.itertuples())


def test_a_model_that_sums_up_its_positions_works():
    model = seeded(lambda: Wrapped(lambda s, x: s.b(s.a(x).relu()).sum(1), a=nn.Linear(4, 5), b=nn.Linear(5, 3)))
    vpd, x = untrained(model), normal(2, 6, 4)
    assert vpd.causal_importances(model, x).concatenated.shape == (2, 6, 10)
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.masked("adversarial", seed=1, steps=3):
            expected = model(x)
        with attached.masked(vpd.adversarial_masks(model, x, seed=1, steps=3)):
            assert_close(model(x), expected, rtol=1e-9, atol=1e-10)
        with attached.masked("zero", sites="b", pos=2):
            without = model(x)
        at_2 = model.a(x).relu()[:, 2] @ model.b.weight.T
        assert_close(without, model(x) - at_2, rtol=1e-10, atol=1e-11)


CONTAINERS = {
    "sequential": (lambda: Wrapped(lambda s, x: s.net(x), net=nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))),
                   ["net.0", "net.2"]),
    "named sequential": (lambda: Wrapped(lambda s, x: s.net(x), net=nn.Sequential()), ["net.first", "net.last"]),
    "list": (lambda: Wrapped(_through, layers=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)])), ["layers.0", "layers.1"]),
    "dictionary": (lambda: Wrapped(_values, layers=nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 3)})),
                   ["layers.a", "layers.b"]),
    "keywords": (lambda: Wrapped(lambda s, x: s.b(input=s.a(input=x)), a=nn.Linear(4, 4), b=nn.Linear(4, 3)), ["a", "b"]),
}  # fmt: skip


def _through(model, x):
    for layer in model.layers:
        x = layer(x)
    return x


def _values(model, x):
    for layer in model.layers.values():
        x = layer(x)
    return x


@pytest.mark.parametrize("name", CONTAINERS)
def test_layers_in_containers_run_once_and_their_hooks_see_their_own_tensors(name):
    """A container runs every child it has, so HookPoints must not become its children."""
    make, sites = CONTAINERS[name]

    def build():
        model = make()
        if name == "named sequential":
            model.net.add_module("first", nn.Linear(4, 6))
            model.net.add_module("last", nn.Linear(6, 3))
            model.setup()
        return model

    model = seeded(build)
    vpd, x = untrained(model), normal(3, 4)
    clean, recorded = model(x), []
    last = model.get_submodule(sites[1])
    with torch.no_grad(), vpd.attach(model) as attached:
        assert list(vpd.sites) == sites and torch.equal(model(x), clean)
        hooks = [
            (f"{n}.hook_{k}", lambda t, hook: recorded.append((hook.name, t.shape[-1]))) for n in sites for k in KINDS
        ]
        assert torch.equal(model.run_with_hooks(x, fwd_hooks=hooks), clean)
        assert sorted(n for n, _ in recorded) == sorted(n for n, _ in hooks)
        assert all(width == (1 if n.endswith("delta_mask") else 5) for n, width in recorded)
        with attached.masked("zero", sites=sites[1]):
            assert_close(model(x), last.bias.expand(3, 3), rtol=1e-12, atol=1e-12)
        _, cache = model.run_with_cache(x, names_filter=f"{sites[1]}.hook_component_acts")
        gone = model.run_with_hooks(x, fwd_hooks=vpd.ablation_hooks(f"{sites[1]}:2"))
        acts = cache[f"{sites[1]}.hook_component_acts"]
        assert_close(gone, clean - acts[:, 2, None] * vpd.U[sites[1]][2], rtol=1e-10, atol=1e-11)


def test_saved_and_loaded_it_attaches_to_the_same_weights_alone(tmp_path):
    model = two_layers()
    vpd, x = untrained(model), normal(3, 4)
    loaded = tl_vpd.Decomposition.load(vpd.save(tmp_path / "own"), dtype=torch.float64)
    assert list(loaded.sites) == [FC, OUT]
    with (
        loaded.attach(two_layers()) as attached,
        attached.masked("rounded"),
        vpd.attach(model) as site_masks,
        site_masks.masked("rounded"),
    ):
        assert_close(attached.model(x), model(x), rtol=1e-6, atol=1e-7)
    other = seeded(lambda: type(model)(), seed=5)
    with pytest.raises(ValueError, match="2 of 2 sites differ"):
        loaded.attach(other)


@pytest.mark.parametrize("mode", ["ci", "adversarial"])
def test_dropout_of_a_model_in_train_mode_is_not_drawn_in_clean_passes(mode):
    def run(model, x):
        return model.out(model.drop(model.fc(x)))

    model = seeded(lambda: Wrapped(run, fc=nn.Linear(4, 6), drop=nn.Dropout(0.5), out=nn.Linear(6, 3)))
    vpd, x, seen = untrained(model, gamma=TRANSFORMER), normal(3, 4), []
    model.train()
    expected = vpd.causal_importances(model, x)["out"]
    torch.manual_seed(0)
    plain = model(x)
    state = torch.get_rng_state()
    options = {"seed": 0} if mode == "adversarial" else {"delta": 1.0}
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked(mode, **options):
        torch.manual_seed(0)
        model.run_with_hooks(x, fwd_hooks=[("out.hook_ci", lambda ci, hook: seen.append(ci.clone()))])
        assert torch.equal(torch.get_rng_state(), state) and model.training and model.drop.training
    assert torch.equal(seen[0], expected)
    torch.manual_seed(0)
    assert torch.equal(model(x), plain)
