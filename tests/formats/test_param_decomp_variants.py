"""Every variant of the authors' files, on runs that the tests write and compute in plain float64: deep ones too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close

from tests.formats import authors
from tests.marks import needs_bridge, needs_hooked_transformer
from tl_vpd.adapters.loading import default_kind
from tl_vpd.formats import load_param_decomp, save_param_decomp
from tl_vpd.formats.param_decomp.names import canonical, module_of, site_of, target_keys

HERE = "TransformerBridge" if default_kind() == "bridge" else "HookedTransformer"
CLASSES = [
    pytest.param("HookedTransformer", marks=needs_hooked_transformer),
    pytest.param("TransformerBridge", marks=needs_bridge),
]


def tokens_of(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, authors.VOCAB, (rows, 9), generator=torch.Generator().manual_seed(1))


def check(folder: Path, state: dict[str, torch.Tensor], n_layer: int, model_class: str = HERE, **options):
    """Reads the run and compares logits, importances and masked logits with plain float64."""
    tokens = tokens_of()
    model, vpd = load_param_decomp(
        folder, model_class, tokens=tokens, check_order=False, dtype=torch.float64, **options
    )
    logits, inputs = authors.forward(state, tokens, n_layer)
    assert_close(model(tokens), logits, atol=2e-5, rtol=1e-6)  # the file's numbers are float32; RMSNorm may be too
    g, ci = authors.importances(state, inputs), vpd.causal_importances(model, tokens)
    assert {site_of(module) for module in g} == set(vpd.sites)
    for module, values in g.items():
        assert_close(ci[site_of(module)], values, atol=1e-4, rtol=0)
    masked, _ = authors.forward(state, tokens, n_layer, {m: ci[site_of(m)] for m in g})
    with vpd.attach(model) as attached, attached.masked("ci", delta=0.0):
        assert_close(model(tokens), masked, atol=1e-4, rtol=1e-5)
    return model, vpd


@pytest.mark.parametrize("model_class", CLASSES)
def test_twelve_layers_whose_tenth_comes_before_their_second(tmp_path, model_class):
    state = authors.random_state(12)
    _, vpd = check(authors.write_run(tmp_path / "run", state, 12), state, 12, model_class)
    assert list(vpd.sites)[6 * 2].startswith("blocks.2.") and vpd.site_axis.total == 12 * sum(authors.COUNTS.values())
    assert set(vpd.record["certificate"]["kl_other_orders"]) == {"forward", "natural"}


def test_a_gamma_in_natural_order_is_seen_as_such(tmp_path):
    state, tokens = authors.random_state(12), tokens_of()
    _, right = load_param_decomp(
        authors.write_run(tmp_path / "right", state, 12), HERE, tokens=tokens, check_order=False
    )
    modules = sorted(authors.shapes(12))
    natural = sorted(modules, key=lambda m: (int(m.split(".")[1]), m))
    d_in = {m: d for m, (d, _) in authors.shapes(12).items()}
    counts = {m: authors.COUNTS[m.rsplit(".", 1)[1]] for m in modules}
    for key, widths, axis in (
        ("_input_projector.W", d_in, 0),
        ("_output_head.W", counts, 1),
        ("_output_head.b", counts, 0),
    ):
        key = f"ci_fn._global_ci_fn.{key}"
        pieces = dict(zip(modules, state[key].split([widths[m] for m in modules], axis), strict=True))
        state[key] = torch.cat([pieces[m] for m in natural], axis)
    _, wrong = load_param_decomp(
        authors.write_run(tmp_path / "wrong", state, 12), HERE, tokens=tokens, check_order=False
    )
    kl = wrong.record["certificate"]
    assert kl["kl_other_orders"]["natural"] == pytest.approx(right.record["certificate"]["kl_ci"], rel=1e-4)
    assert abs(kl["kl_ci"] - right.record["certificate"]["kl_ci"]) > 1e-2


@pytest.mark.parametrize("model_class", CLASSES)
def test_fewer_key_heads_than_query_heads(tmp_path, model_class):
    state = authors.random_state(2, kv_heads=1)
    model, _ = check(authors.write_run(tmp_path / "run", state, 2, kv_heads=1), state, 2, model_class)
    assert model.cfg.n_key_value_heads == 1


@pytest.mark.parametrize("model_class", CLASSES)
def test_another_rotary_base_and_norm_epsilon_reach_the_model(tmp_path, model_class):
    state = authors.random_state(1)
    folder = authors.write_run(tmp_path / "run", state, 1)
    config = {**authors.model_config(1, base=500), "rms_norm_eps": 1e-3}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    model, vpd = load_param_decomp(folder, model_class, check_order=False)
    assert (model.cfg.rotary_base, model.cfg.eps) == (500, 1e-3)
    expected, _ = authors.forward(state, tokens_of(), 1, base=500, eps=1e-3)
    assert_close(model(tokens_of()).double(), expected, atol=2e-5, rtol=1e-6)
    written = save_param_decomp(vpd, model, tmp_path / "written")
    config = yaml.safe_load((written / "target" / "model_config.yaml").read_text())
    assert (config["rotary_base"], config["rms_norm_eps"]) == (500, 1e-3)


def test_a_small_mlp_per_subcomponent(tmp_path):
    state = authors.random_state(2, mlps=5)
    ci = {"mode": "layerwise", "fn_type": "mlp", "hidden_dims": [5]}
    _, vpd = check(authors.write_run(tmp_path / "run", state, 2, ci=ci), state, 2)
    assert vpd.gamma_config.kind == "per_subcomponent_mlps" and vpd.gamma_config.hidden == 5
    assert vpd.record["certificate"]["kl_other_orders"] == {}


def older_names(key: str) -> str:
    key = re.sub(r"^target_model\.(.*(?:_proj|c_fc))\.weight", r"patched_model.\1.original.weight", key)
    key = re.sub(r"^target_model\.", "patched_model.", key)
    return re.sub(r"^ci_fn\._ci_fns", "_gates", key)


def components_in_the_target(key: str) -> str:
    match = re.fullmatch(r"_components\.(.*)\.([UV])", key)
    return f"patched_model.{match[1].replace('-', '.')}.components.{match[2]}" if match else older_names(key)


def fused(key: str) -> str:
    match = re.fullmatch(r"_components\.(.*)\.([UV])", key)
    key = f"target_model.{match[1].replace('-', '.')}.{match[2]}" if match else key
    return re.sub(r"(_proj|c_fc)\.weight$", r"\1.linear.weight", key) if key.startswith("target_model.") else key


@pytest.mark.parametrize(
    ("rename", "mlps"),
    [
        (older_names, 3),
        (older_names, None),
        (components_in_the_target, 3),
        (components_in_the_target, None),
        (fused, None),
    ],
)
def test_older_and_other_names_of_keys(tmp_path, rename, mlps):
    state = authors.random_state(2, mlps=mlps)
    renamed = {rename(key): tensor for key, tensor in state.items()}
    assert renamed.keys() != state.keys() and {canonical(k) for k in renamed} == {canonical(k) for k in state}
    ci = {"mode": "layerwise", "fn_type": "mlp", "hidden_dims": [3]} if mlps else None
    check(authors.write_run(tmp_path / "run", renamed, 2, ci=ci), state, 2)


def test_the_oldest_config(tmp_path):
    state = {k: v for k, v in authors.random_state(2, mlps=4).items() if not k.startswith("_components.")}
    generator = torch.Generator().manual_seed(5)
    for module, (d_in, d_out) in authors.shapes(2).items():
        state[f"_components.{module.replace('.', '-')}.V"] = torch.randn(d_in, 4, generator=generator)
        state[f"_components.{module.replace('.', '-')}.U"] = torch.randn(4, d_out, generator=generator)
        for key in [k for k in state if k.startswith(f"ci_fn._ci_fns.{module.replace('.', '-')}.")]:
            state[key] = torch.randn(4, *state[key].shape[1:], generator=generator)
    folder = authors.write_run(tmp_path / "run", state, 2)
    config = {
        "C": 4,
        "target_module_patterns": ["h.*.attn.*", "h.*.mlp.*"],
        "ci_fn_type": "mlp",
        "ci_fn_hidden_dims": [4],
    }
    (folder / "final_config.yaml").write_text(yaml.safe_dump(config))
    check(folder, state, 2)


def single_file(state: dict[str, torch.Tensor], n_layer: int, *, with_weights: bool = False) -> dict:
    """The single file of the same run: weights of linear layers, Γ in the layout of nn.Linear."""
    names = {"_input_projector": "proj_in", "_output_head": "proj_out", "_blocks": "blocks", "out_proj": "o_proj"}
    ci_fn = {}
    for key, tensor in state.items():
        if key.startswith("ci_fn._global_ci_fn.") and not key.endswith("inv_freq"):
            name = key.removeprefix("ci_fn._global_ci_fn.")
            for old, new in names.items():
                name = name.replace(old, new)
            name = re.sub(r"\.W$", ".weight", re.sub(r"\.b$", ".bias", name))
            ci_fn[name] = tensor.T.contiguous() if key.endswith(".W") else tensor
    wrappers = {}
    for module in authors.shapes(n_layer):
        prefix = f"_components.{module.replace('.', '-')}."
        wrappers[module] = {"V": state[f"{prefix}V"], "U": state[f"{prefix}U"]}
        if with_weights:
            wrappers[module]["W_target"] = state[f"target_model.{module}.weight"]
    cfg = {
        "ci_d_model": authors.D_CI,
        "ci_n_blocks": 2,
        "ci_n_heads": 2,
        "ci_mlp_hidden": authors.CI_MLP,
        "ci_rope_base": 1e4,
    }
    counts = {m: authors.COUNTS[m.rsplit(".", 1)[1]] for m in wrappers}
    metrics = {"kl_ci": 0.25, "figure": "text"}
    return {
        "method": "vpd",
        "wrappers": wrappers,
        "ci_fn": ci_fn,
        "C_per_module": counts,
        "cfg": cfg,
        "final_metrics": metrics,
    }


def target_folder(folder: Path, state: dict[str, torch.Tensor], n_layer: int) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(authors.model_config(n_layer)))
    target = {k.removeprefix("target_model."): v for k, v in state.items() if k.startswith("target_model.")}
    torch.save(target, folder / "checkpoints" / "model_step_99.pt")
    return folder


@pytest.mark.parametrize("with_weights", [False, True])
def test_a_single_file_with_its_target_beside(tmp_path, with_weights):
    state = authors.random_state(2)
    target = target_folder(tmp_path / "target-run", state, 2)
    (tmp_path / "nano").mkdir()
    torch.save(single_file(state, 2, with_weights=with_weights), tmp_path / "nano" / "result.pt")
    _, vpd = check(tmp_path / "nano", state, 2, target=target)
    assert vpd.record["certificate"]["own_metrics"] == {"kl_ci": 0.25}
    check(tmp_path / "nano" / "result.pt", state, 2, target=str(target))


@pytest.mark.parametrize("place", ["run/target", "run/t-0000abcd", "t-0000abcd", "target"])
def test_a_target_kept_apart_is_found(tmp_path, place):
    state = authors.random_state(2)
    own = {k: v for k, v in state.items() if not k.startswith("target_model.")}
    folder = authors.write_run(tmp_path / "run", own, 2)
    (folder / "model_config.yaml").unlink()
    target_folder(tmp_path / place, state, 2)
    check(folder, state, 2)


def test_the_newer_configs_path_to_the_target_is_followed(tmp_path):
    state = authors.random_state(2)
    folder = authors.write_run(
        tmp_path / "run", {k: v for k, v in state.items() if not k.startswith("target_model.")}, 2
    )
    old = yaml.safe_load((folder / "final_config.yaml").read_text())
    (folder / "final_config.yaml").unlink()
    (folder / "model_config.yaml").unlink()
    spec = {
        "kind": "pretrained",
        "model_class": "x.LlamaSimpleMLP",
        "run_path": "pretrained/a/checkpoints/model_step_99.pt",
    }
    new = {
        "pd": {"decomposition_targets": old["module_info"], "ci_config": old["ci_config"]},
        "target": {"spec": spec},
        "data": {"tokenizer_name": "none"},
    }
    (folder / "experiment_config.yaml").write_text(yaml.safe_dump(new))
    target_folder(tmp_path / "pretrained" / "a", state, 2)
    check(folder, state, 2)


def test_some_modules_of_some_layers(tmp_path):
    state = authors.random_state(3)
    keep = {"h.0.mlp.c_fc", "h.2.attn.k_proj"}
    state = {
        k: v for k, v in state.items() if not k.startswith("_components.") or k.split(".")[1].replace("-", ".") in keep
    }
    state["ci_fn._global_ci_fn._input_projector.W"] = state["ci_fn._global_ci_fn._input_projector.W"][: 2 * authors.D]
    for name in ("W", "b"):
        head = state[f"ci_fn._global_ci_fn._output_head.{name}"]
        state[f"ci_fn._global_ci_fn._output_head.{name}"] = head[
            ..., : authors.COUNTS["c_fc"] + authors.COUNTS["k_proj"]
        ]
    folder = authors.write_run(tmp_path / "run", state, 3)
    config = yaml.safe_load((folder / "final_config.yaml").read_text())
    config["module_info"] = [{"module_pattern": m, "C": authors.COUNTS[m.rsplit(".", 1)[1]]} for m in keep]
    (folder / "final_config.yaml").write_text(yaml.safe_dump(config))
    _, vpd = load_param_decomp(folder, HERE, tokens=tokens_of(), check_order=False)
    assert list(vpd.sites) == ["blocks.0.mlp.W_in", "blocks.2.attn.W_K"]


def test_half_precision_is_read_with_a_warning(tmp_path):
    state = {k: v.half() for k, v in authors.random_state(2).items()}
    with pytest.warns(UserWarning, match=r"model_7\.pth stores torch\.float16: what is read is no more exact"):
        check(authors.write_run(tmp_path / "run", state, 2), state, 2)


@pytest.mark.parametrize("mlps", [None, 4])
@pytest.mark.parametrize("model_class", CLASSES)
def test_written_and_read_again_it_is_the_same_to_the_bit(tmp_path, mlps, model_class):
    n_layer = 2 if mlps else 11
    state = authors.random_state(n_layer, mlps=mlps)
    ci = {"mode": "layerwise", "fn_type": "mlp", "hidden_dims": [4]} if mlps else None
    model, vpd = load_param_decomp(
        authors.write_run(tmp_path / "run", state, n_layer, ci=ci), model_class, tokens=tokens_of(), check_order=False
    )
    folder = save_param_decomp(vpd, model, tmp_path / "written")
    stored = torch.load(folder / "model_7.pth", weights_only=True)
    assert stored.keys() == state.keys() and all(torch.equal(stored[k], t) for k, t in state.items())
    again, read = load_param_decomp(folder, model_class, tokens=tokens_of(), check_order=False)
    tensors = read.file_tensors()
    assert all(torch.equal(t, tensors[key]) for key, t in vpd.file_tensors().items())
    assert torch.equal(again(tokens_of()), model(tokens_of()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "written"]


def test_names_there_and_back():
    for module in authors.shapes(11):
        assert module_of(site_of(module)) == module
    assert site_of("h.0.attn.c_attn") is None and site_of("wte") is None and module_of("blocks.0.mlp.W_gate") is None
    assert len(target_keys(11)) == 2 + 11 * 8
