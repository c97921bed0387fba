"""Bad input: each in one sentence that says which file, what came and what to do; nothing is left behind."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.formats import authors
from tests.formats.test_param_decomp import RUN
from tests.formats.test_param_decomp_variants import HERE, single_file, target_folder, tokens_of
from tests.tiny import decomposition_of, tiny_model
from tl_vpd.formats import load_param_decomp, save_param_decomp
from tl_vpd.formats.param_decomp.config import RunConfig
from tl_vpd.formats.param_decomp.target import shape_of, target_config

STATE = authors.random_state(2)
G = "ci_fn._global_ci_fn."


@pytest.fixture
def run(tmp_path) -> Path:
    return authors.write_run(tmp_path / "run", STATE, 2)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


def stored(run: Path, change: Callable[[dict[str, Any]], Any], file: str = "model_7.pth") -> None:
    state = dict(STATE)
    change(state)
    torch.save(state, run / file)


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda run: edit(run / "final_config.yaml", change)


def target(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda run: edit(run / "model_config.yaml", change)


def weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda run: stored(run, change)


def ci(**changes: Any) -> Callable[[Path], None]:
    return config(lambda c: c["ci_config"].update(changes))


def gamma_size(**changes: Any) -> Callable[[Path], None]:
    return config(lambda c: c["ci_config"]["simple_transformer_ci_cfg"].update(changes))


def cut_short(run: Path) -> None:
    whole = (run / "model_7.pth").read_bytes()
    (run / "model_7.pth").write_bytes(whole[: len(whole) // 2])


def another_object(run: Path) -> None:
    torch.save({"model": Path("x"), **STATE}, run / "model_7.pth")


def leads_out(name: str) -> Callable[[Path], None]:
    def link(run: Path) -> None:
        (run / name).rename(run.parent / name)
        (run / name).symlink_to(run.parent / name)

    return link


def quantised(state: dict[str, Any]) -> None:
    state["target_model.h.0.mlp.c_fc.weight"] = torch.zeros(authors.D_MLP, authors.D, dtype=torch.int8)


def not_tied(state: dict[str, Any]) -> None:
    state["target_model.lm_head.weight"] = state["target_model.lm_head.weight"] + 1


def not_finite(key: str) -> Callable[[Path], None]:
    def change(state: dict[str, Any]) -> None:
        state[key] = state[key].clone()
        state[key].view(-1)[0] = float("nan")

    return weights(change)


def twice(state: dict[str, Any]) -> None:
    state["patched_model.ln_f.weight"] = state["target_model.ln_f.weight"] + 1


V0 = "_components.h-0-mlp-c_fc.V"
BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no checkpoint": (
        lambda run: (run / "model_7.pth").unlink(),
        FileNotFoundError,
        r"run has no checkpoint: it needs model_",
    ),
    "no config": (
        lambda run: (run / "final_config.yaml").unlink(),
        FileNotFoundError,
        "has none of experiment_config.yaml",
    ),
    "no target config": (
        lambda run: (run / "model_config.yaml").unlink(),
        ValueError,
        r"heads of the target \(wandb:goodfire",
    ),
    "half a download": (cut_short, ValueError, "is not a whole file of torch.save .* half a download"),
    "an object": (another_object, ValueError, r"holds an object of pathlib\.\w+: only tensors and plain data"),
    "a list": (lambda run: torch.save([1], run / "model_7.pth"), ValueError, "holds a list where tensors by name"),
    "a config that is a list": (
        lambda run: (run / "final_config.yaml").write_text("- 1"),
        ValueError,
        "holds list where names",
    ),
    "no YAML": (
        lambda run: (run / "final_config.yaml").write_text("a: [1"),
        ValueError,
        "is not YAML that can be read",
    ),
    "an object in YAML": (
        lambda run: (run / "final_config.yaml").write_text("!!python/object/apply:os.system ['true']"),
        ValueError,
        "is not YAML that can be read as data",
    ),
    "checkpoint links out": (
        leads_out("model_7.pth"),
        ValueError,
        "model_7.pth is a link to .*, out of the run's folder",
    ),
    "config links out": (leads_out("final_config.yaml"), ValueError, "final_config.yaml is a link to"),
    "target config links out": (leads_out("model_config.yaml"), ValueError, "model_config.yaml is a link to"),
    "another C": (
        config(lambda c: c["module_info"][4].update(C=9)),
        ValueError,
        r"C of h\.0\.mlp\.c_fc is 7 in the checkpoint, and .*final_config\.yaml says 9",
    ),
    "a module that is not there": (
        config(lambda c: c["module_info"].append({"module_pattern": "h.2.*", "C": 3})),
        ValueError,
        r"decomposes h\.2\.\*, and the checkpoint has no such module",
    ),
    "a module not listed": (config(lambda c: c["module_info"].pop()), ValueError, "which .* does not list"),
    "no C": (config(lambda c: c["module_info"][0].pop("C")), ValueError, "has no C: it is not the config"),
    "C as text": (config(lambda c: c.update(module_info=3)), ValueError, "has a setting of the wrong kind"),
    "C as a word": (
        config(lambda c: c["module_info"][1].update(C="many")),
        ValueError,
        r"final_config\.yaml: C of 'h\.\*\.attn\.k_proj' is 'many', and a pattern of modules with a number of at least 1",
    ),
    "a number as a module": (
        config(lambda c: c["module_info"][1].update(module_pattern=7)),
        ValueError,
        "C of 7 is 5, and a pattern of modules",
    ),
    "a number as the target": (
        config(lambda c: c.update(pretrained_model_name=7)),
        ValueError,
        r"final_config\.yaml: pretrained_model_name is 7, and text is needed",
    ),
    "a context as text": (
        target(lambda c: c.update(block_size="x")),
        ValueError,
        r"model_config\.yaml: block_size is 'x', and a number from 1 to",
    ),
    "endless layers": (
        target(lambda c: c.update(n_layer=10**30)),
        ValueError,
        "n_layer is 10{30}, and a number from 1",
    ),
    "endless depth of Γ": (gamma_size(n_blocks=1 << 27), ValueError, r"Γ's blocks\.2\.q\.weight is missing"),
    "Γ's heads of odd width": (
        gamma_size(attn_config={"n_heads": 4}),
        ValueError,
        "Γ has sizes that do not fit: d_ci=12 does not divide into n_heads=4",
    ),
    "a sigmoid": (
        config(lambda c: c.update(sigmoid_type="hard")),
        ValueError,
        "sigmoid_type is 'hard', and 'leaky_hard'",
    ),
    "binomial sampling": (config(lambda c: c.update(sampling="binomial")), ValueError, "sampling is 'binomial'"),
    "a CI kind": (ci(fn_type="global_reverse_residual"), ValueError, "a Γ of fn_type 'global_reverse_residual'"),
    "another CI mode": (
        ci(mode="layerwise"),
        ValueError,
        r"'global_shared_transformer' \(mode 'layerwise'\) is not read",
    ),
    "two hidden layers": (
        ci(mode="layerwise", fn_type="mlp", hidden_dims=[3, 4]),
        ValueError,
        r"hidden_dims of the small MLPs is \[3, 4\]",
    ),
    "MLPs that are not there": (
        ci(mode="layerwise", fn_type="mlp", hidden_dims=[3]),
        ValueError,
        "does not have the small MLPs",
    ),
    "identity": (config(lambda c: c.update(identity_module_info=[1])), ValueError, "identity_module_info is set"),
    "another target class": (
        config(lambda c: c.update(pretrained_model_class="transformers.GPT2LMHeadModel")),
        ValueError,
        "the target is a GPT2LMHeadModel, and only LlamaSimpleMLP",
    ),
    "another rope base": (
        gamma_size(attn_config={"n_heads": 2, "rope_base": 500.0}),
        ValueError,
        "Γ's rope_base is 500.0, and 10000",
    ),
    "other heads of Γ": (
        gamma_size(attn_config={"n_heads": 3}),
        ValueError,
        "are not the rotary frequencies of 3 heads",
    ),
    "another width of Γ": (
        gamma_size(d_model=16),
        ValueError,
        r"Γ's embed.weight is \(12, 208\), and by the run's config \(16, 208\)",
    ),
    "another depth of Γ": (
        gamma_size(n_blocks=3),
        ValueError,
        r"model_7\.pth: Γ's blocks\.2\.q\.weight is missing, and by the run's config \(12, 12\)",
    ),
    "less depth of Γ": (
        gamma_size(n_blocks=1),
        ValueError,
        r"Γ has blocks\.1\.k\.weight, and by the run's config it does not",
    ),
    "another MLP of Γ": (
        gamma_size(mlp_hidden_dim=None),
        ValueError,
        r"Γ's blocks\.0\.mlp_in\.weight is \(20, 12\), and by the run's config \(48, 12\)",
    ),
    "no depth of Γ": (gamma_size(n_blocks=0), ValueError, r"final_config\.yaml: .*n_blocks=0"),
    "two layers in Γ's MLP": (gamma_size(mlp_hidden_dim=[3, 4]), ValueError, r"mlp_hidden_dim of Γ is \[3, 4\]"),
    "another model type": (
        target(lambda c: c.update(model_type="GPT2Simple")),
        ValueError,
        "model_type is 'GPT2Simple', and",
    ),
    "biases": (target(lambda c: c.update(mlp_bias=True)), ValueError, "mlp_bias is True, and False is the one"),
    "no heads": (target(lambda c: c.pop("n_head")), ValueError, "n_head is None, and a number from 1"),
    "heads that do not divide": (target(lambda c: c.update(n_head=3)), ValueError, "n_head=3 .* do not divide"),
    "an epsilon of text": (target(lambda c: c.update(rms_norm_eps="small")), ValueError, "rms_norm_eps is 'small'"),
    "rotary positions on half a head": (
        target(lambda c: c.update(rotary_dim=4)),
        ValueError,
        "rotary_dim is 4, and only the whole head, 8, is read",
    ),
    "half a rotary base": (target(lambda c: c.update(rotary_base=0.5)), ValueError, "rotary_base is 0.5, and"),
    "another vocabulary": (
        target(lambda c: c.update(vocab_size=30)),
        ValueError,
        r"wte.weight is \(29, 16\), and the target's",
    ),
    "fewer layers": (
        target(lambda c: c.update(n_layer=1)),
        ValueError,
        r"has 'h\.1\..*', which a LlamaSimpleMLP of 1 layers",
    ),
    "more layers": (target(lambda c: c.update(n_layer=3)), ValueError, "lacks 8 weights of the target"),
    "V without U": (
        weights(lambda s: s.pop("_components.h-0-mlp-c_fc.U")),
        ValueError,
        r"has V of h\.0\.mlp\.c_fc only",
    ),
    "V of another width": (weights(lambda s: s.update({V0: torch.zeros(5, 7)})), ValueError, "are for a 5x24 matrix"),
    "V and U of two C": (
        weights(lambda s: s.update({V0: torch.zeros(16, 8)})),
        ValueError,
        r"is \(16, 8\) and U \(7, 24\)",
    ),
    "a key left over": (
        weights(lambda s: s.update(extra=torch.zeros(1))),
        ValueError,
        "has the key 'extra', which no format",
    ),
    "a key of Γ left over": (
        weights(lambda s: s.update({f"{G}_blocks.0.attn.q_proj.bias": torch.zeros(12)})),
        ValueError,
        "has the key .*q_proj.bias'",
    ),
    "a target key left over": (
        weights(lambda s: s.update({"target_model.h.0.mlp.gate_proj.weight": torch.zeros(24, 16)})),
        ValueError,
        r"has 'h\.0\.mlp\.gate_proj\.weight', which a LlamaSimpleMLP of 2 layers does not have",
    ),
    "another architecture": (
        weights(lambda s: s.update({"_components.transformer-h-0-attn-c_attn.V": torch.zeros(4, 2)})),
        ValueError,
        r"has V of transformer\.h\.0\.attn\.c_attn only",
    ),
    "no decomposition": (
        weights(lambda s: [s.pop(k) for k in list(s) if "_components" in k]),
        ValueError,
        r"has no V and U \(_components",
    ),
    "not tied": (weights(not_tied), ValueError, "lm_head and wte differ"),
    "twice": (weights(twice), ValueError, "has target_model.ln_f.weight twice with different numbers"),
    "quantised": (weights(quantised), ValueError, "is torch.int8, and floating-point weights are needed"),
    "sparse": (
        weights(lambda s: s.update({V0: s[V0].to_sparse()})),
        ValueError,
        r"c_fc\.V is stored as torch\.sparse_coo, and plain tensors are needed",
    ),
    "no data": (weights(lambda s: s.update({V0: s[V0].to("meta")})), ValueError, r"c_fc\.V has no data, and plain"),
    "NaN in V": (not_finite(V0), ValueError, r"V/blocks\.0\.mlp\.W_in has 1 of 112 entries that are NaN"),
    "NaN in Γ": (not_finite(f"{G}_output_head.b"), ValueError, r"gamma/unembed\.bias has 1 of 66 entries that are NaN"),
    "NaN in the target": (
        not_finite("target_model.ln_f.weight"),
        ValueError,
        r"ln_f\.weight has 1 of 16 entries that are NaN",
    ),
    "broken metrics": (
        lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo'),
        ValueError,
        r"the last line of .*metrics\.jsonl is not JSON",
    ),
    "metrics link out": (
        lambda run: (run / "metrics.jsonl").symlink_to("/etc/hostname"),
        ValueError,
        r"metrics\.jsonl is a link to",
    ),
    "an importance order": (
        lambda run: None,
        ValueError,
        r"look like those of a wrong order of modules: as masks they give KL [\d.]+ \(shuffled: [\d.]+, forward",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(run, name):
    spoil, error, message = BAD[name]
    spoil(run)
    with warnings.catch_warnings(), pytest.raises(error, match=message) as raised:
        warnings.simplefilter("ignore", DeprecationWarning)
        load_param_decomp(run, HERE, tokens=tokens_of())
    text = str(raised.value.args[0])
    assert "\n" not in text and text.endswith(".")


WRONG = [None, "x", -1, 0, 1.5, [], {}, True, float("nan"), 10**30, [None], {"a": 1}]
"""What no setting means; None leaves it out too."""


def variants(content: Any) -> Iterator[Any]:
    """The content with each of its values replaced by each wrong one, or left out."""
    for key in range(len(content)) if isinstance(content, list) else list(content):
        for wrong in WRONG:
            changed = copy.copy(content)
            changed[key] = wrong
            yield changed
        if isinstance(content, dict):
            yield {k: v for k, v in content.items() if k != key}
        if isinstance(content[key], dict | list):
            for inner in variants(content[key]):
                changed = copy.copy(content)
                changed[key] = inner
                yield changed


READ_OF_PD = (
    "decomposition_targets",
    "ci_config",
    "sigmoid_type",
    "sampling",
    "identity_decomposition_targets",
    "tied_weights",
)


def newer_config() -> dict[str, Any]:
    """What is read of a newer config."""
    whole = yaml.safe_load((RUN / "experiment_config.yaml").read_text())
    pd = {key: whole["pd"][key] for key in READ_OF_PD}
    pd["decomposition_targets"] = pd["decomposition_targets"][:1]
    return {"pd": pd, "target": whole["target"], "data": whole["data"]}


@pytest.mark.parametrize("file", ["final_config.yaml", "experiment_config.yaml", "model_config.yaml", "cfg"])
def test_every_setting_of_a_wrong_kind_is_refused_in_one_sentence(run, file):
    counts = {f"h.0.{kind}": authors.COUNTS[kind.split(".")[1]] for kind in authors.KINDS}
    content = {
        "final_config.yaml": lambda: yaml.safe_load((run / "final_config.yaml").read_text()),
        "experiment_config.yaml": newer_config,
        "model_config.yaml": lambda: authors.model_config(1),
        "cfg": lambda: {**single_file(STATE, 2, with_weights=True)["cfg"], "C_per_module": counts},
    }[file]()
    refused = 0
    for changed in variants(content):
        try:
            if file == "model_config.yaml":
                shape_of(changed, file)
            else:
                config = RunConfig.read(changed, file)
                if file != "experiment_config.yaml":
                    config.check_counts(counts)
        except ValueError as error:
            refused += 1
            text = str(error)
            assert "\n" not in text and text.endswith(".") and (file in text or "the checkpoint" in text), (
                changed,
                text,
            )
    assert refused > 50


def test_the_newest_of_two_checkpoints_is_read_and_named(run):
    stored(run, lambda s: s.update({"target_model.ln_f.weight": s["target_model.ln_f.weight"] * 2}), "model_12.pth")
    with pytest.warns(UserWarning, match=r"has 2 checkpoints: model_12\.pth is read, not model_7\.pth"):
        _, vpd = load_param_decomp(run, HERE, tokens=tokens_of(), check_order=False)
    assert (vpd.record["source"]["checkpoint"], vpd.record["source"]["step"]) == ("model_12.pth", 12)
    (run / "model_7.pth").rename(run / "a.pth")
    (run / "model_12.pth").rename(run / "b.pth")
    with pytest.raises(ValueError, match=r"several checkpoints without a number \(a\.pth, b\.pth\)"):
        load_param_decomp(run, HERE)
    _, vpd = load_param_decomp(run / "a.pth", HERE, tokens=tokens_of(), check_order=False)
    assert vpd.record["source"]["checkpoint"] == "a.pth" and vpd.record["source"]["step"] is None


def test_what_is_neither_a_folder_nor_a_run(tmp_path):
    for run in (tmp_path / "nowhere", "runs/s-55ea3f9b", ""):
        with pytest.raises((FileNotFoundError, ValueError), match=r"is neither a folder|has no checkpoint"):
            load_param_decomp(run if run != "" else tmp_path, HERE)


def test_a_model_class_that_does_not_exist(run):
    with pytest.raises(ValueError, match=r"model_class='GPT'.*choose from 'HookedTransformer', 'TransformerBridge'"):
        load_param_decomp(run, "GPT")


def test_a_target_that_is_missing_incomplete_or_another(tmp_path):
    own = {k: v for k, v in STATE.items() if not k.startswith("target_model.")}
    run = authors.write_run(tmp_path / "run", own, 2)
    with pytest.raises(FileNotFoundError, match="empty has no checkpoint: it needs"):
        (tmp_path / "empty").mkdir()
        shutil.copy(run / "model_config.yaml", tmp_path / "empty")
        load_param_decomp(run, HERE, target=tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"has no model_config\.yaml: give the folder of the target's run"):
        load_param_decomp(run, HERE, target=tmp_path)
    (run / "model_config.yaml").unlink()
    (tmp_path / "nano").mkdir()
    torch.save(single_file(STATE, 2, with_weights=True), tmp_path / "nano" / "result.pt")
    other = target_folder(tmp_path / "other", authors.random_state(2, seed=9), 2)
    with pytest.raises(
        ValueError, match=r"is another target than the one of .*result\.pt: blocks\.0\.attn\.W_Q differs"
    ):
        load_param_decomp(tmp_path / "nano", HERE, target=other)


def test_the_papers_target_needs_no_config(tmp_path):
    settings, source = target_config(None, "wandb:goodfire/spd/runs/t-9d2b8f02")
    shape = shape_of(settings, source)
    assert (shape.n_layers, shape.d_model, shape.n_heads, shape.d_head, shape.d_mlp) == (4, 768, 6, 128, 3072)
    assert (shape.n_ctx, shape.d_vocab, shape.eps, shape.rotary_base) == (512, 50_277, 1e-6, 10_000)


def test_the_tokenizer_is_read_where_there_is_one_and_missed_aloud(run):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 1, "b": 2, "<|endoftext|>": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(run / "tokenizer.json"))
    model, vpd = load_param_decomp(run, HERE, check_order=False)
    assert model.to_tokens("a b b").tolist() == [[1, 2, 2]] and vpd.record["certificate"]["tokens"] == "text"
    written = save_param_decomp(vpd, model, run.parent / "written")
    again, _ = load_param_decomp(written, HERE, check_order=False)
    assert again.to_tokens("b a").tolist() == [[2, 1]]
    (run / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that can be read"):
        load_param_decomp(run, HERE)
    (run / "tokenizer.json").unlink()
    edit(run / "final_config.yaml", lambda c: c.update(task_config={"tokenizer_name": "nobody/has-this"}))
    with pytest.warns(UserWarning, match="The tokenizer nobody/has-this is not on this machine"):
        model, _ = load_param_decomp(run, HERE, check_order=False)
    assert model.tokenizer is None


def test_what_save_param_decomp_refuses_leaves_nothing(run, tmp_path):
    model, vpd = load_param_decomp(run, HERE, tokens=tokens_of(), check_order=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(FileExistsError, match="full is not an empty folder: give the path of a new one"):
        save_param_decomp(vpd, model, tmp_path / "full")
    other, _ = load_param_decomp(
        authors.write_run(tmp_path / "other", authors.random_state(2, seed=4), 2),
        HERE,
        tokens=tokens_of(),
        check_order=False,
    )
    with pytest.raises(ValueError, match="This model's weights are not the decomposed ones"):
        save_param_decomp(vpd, other, tmp_path / "new")
    if HERE == "HookedTransformer":
        with torch.no_grad():
            model.blocks[1].mlp.b_out.add_(0.5)
        with pytest.raises(ValueError, match="is not a LlamaSimpleMLP: one of its weights gives logits that differ by"):
            save_param_decomp(vpd, model, tmp_path / "new")
        plain = tiny_model(normalization_type="RMS", gated_mlp=True, act_fn="silu")
        with pytest.raises(ValueError, match="W_gate is not a weight of a LlamaSimpleMLP"):
            save_param_decomp(decomposition_of(plain), plain, tmp_path / "new")
        folded = tiny_model(normalization_type="RMSPre")
        with pytest.raises(ValueError, match=r"blocks\.0\.ln1\.w is missing, and a LlamaSimpleMLP has one"):
            save_param_decomp(decomposition_of(folded).double(), folded, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "other", "run"]


def test_a_gamma_that_the_format_does_not_have(run, tmp_path):
    model, _ = load_param_decomp(run, HERE, tokens=tokens_of(), check_order=False)
    vpd = decomposition_of(model, gamma=dict(kind="per_site_mlps", hidden=3))
    with pytest.raises(ValueError, match="Γ is of kind 'per_site_mlps', which the authors' format does not have"):
        save_param_decomp(vpd, model, tmp_path / "new")
    causal = decomposition_of(model, gamma=dict(d_ci=8, n_blocks=1, n_heads=2, causal=True))
    with pytest.raises(ValueError, match="Γ is causal, which the authors' format does not say"):
        save_param_decomp(causal, model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_torch_load_executes_nothing(tmp_path):
    run, mark = authors.write_run(tmp_path / "run", STATE, 2), tmp_path / "executed"
    script = f"""
import torch
class Evil:
    def __reduce__(self):
        return (open, ({str(mark)!r}, "w"))
torch.save({{"x": Evil()}}, {str(run / "model_7.pth")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(ValueError, match="holds an object of"):
        load_param_decomp(run, HERE)
    assert not mark.exists()
