"""The runner: what it writes, what it skips, what it refuses; and the recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import toy_results as results
from benchmarks import toys as runner
from benchmarks.toy_results import PUBLISHED
from tl_vpd.baselines import METHODS
from tl_vpd.toys import TOYS, recipe
from tl_vpd.training import VPDConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path):
    def go(*arguments: str) -> dict:
        fixed = [
            "--out",
            str(tmp_path / "found.json"),
            "--work",
            str(tmp_path / "work"),
            "--quiet",
            "--target-steps",
            "40",
        ]
        runner.main([*arguments, *fixed])
        path = tmp_path / "found.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    return go


def test_entries_are_written_seed_by_seed_and_not_made_twice(command, monkeypatch):
    result = command("--toy", "tms_5_2_id", "--method", "vpd", "--seeds", "0", "--steps", "5")
    made = []
    measure = runner.measure
    monkeypatch.setattr(runner, "measure", lambda *a, **k: made.append(a) or measure(*a, **k))
    more = command("--toy", "tms_5_2_id", "--method", "vpd", "apd", "--seeds", "0", "1", "--steps", "5")
    assert [arguments[:3] for arguments in made] == [
        ("tms_5_2_id", "vpd", 1),
        ("tms_5_2_id", "apd", 0),
        ("tms_5_2_id", "apd", 1),
    ]
    entry = more["tms_5_2_id"]["vpd"]
    assert entry["seed"] == [0, 1] and entry["true"] == {"embed": 5, "identity": 2, "unembed": 5}
    assert [len(entry[name]) for name in ("mmcs", "ml2r", "seconds")] == [2, 2, 2]
    assert all(len(counts) == 2 for counts in entry["alive"].values())
    assert entry["mmcs"][0] == result["tms_5_2_id"]["vpd"]["mmcs"][0] and entry["settings"]["steps"] == 5
    assert {"torch", "numpy"} <= set(entry["versions"]) and entry["target"]["seed"] == [0, 0]
    assert set(entry["by_site"]["count_errors"]) == {"embed", "identity", "unembed"}
    assert set(entry["by_site"]["together"]) == {"identity"} and set(entry["by_site"]["mmcs"]) == {"embed", "unembed"}
    assert set(entry["reconstruction"]) >= {"unmasked", "stochastic", "adversarial"}
    table = results.table(more)
    assert len(table) == 4 and table["alive identity"].str.fullmatch(r"\d+/2").all()


def test_entries_of_other_settings_are_refused(command):
    command("--toy", "tms_5_2", "--steps", "3")
    with pytest.raises(ValueError, match="has tms_5_2 by vpd with other settings: choose another file"):
        command("--toy", "tms_5_2", "--steps", "4")


def test_settings_added_since_do_not_make_an_entry_another(command, tmp_path):
    result = command("--toy", "tms_5_2", "--steps", "3")
    del result["tms_5_2"]["vpd"]["settings"]["init_scale"]
    settings = recipe("tms_5_2", "vpd", steps=3).model_copy(update={"init_scale": 1.0})
    (tmp_path / "found.json").write_text(json.dumps(result))
    assert results.is_measured(
        tmp_path / "found.json", "tms_5_2", "vpd", 0, settings.model_dump(mode="json", exclude={"seed"})
    )
    with pytest.raises(ValueError, match="with other settings"):  # the recipe's value is not the default
        command("--toy", "tms_5_2", "--steps", "3")


def test_a_target_is_trained_once_and_read_from_then_on(command, tmp_path, capsys):
    command("--toy", "tms_5_2", "--only-target")
    (path,) = (tmp_path / "work").glob("*.safetensors")
    before = path.read_bytes(), path.stat().st_mtime_ns
    command("--toy", "tms_5_2", "--only-target")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith("tms_5_2: error ")


@pytest.mark.parametrize("method", ["vpd", "spd"])
@pytest.mark.parametrize("toy", ["induction", "grammar"])
def test_language_toys_are_measured_by_what_is_known(command, toy, method, monkeypatch):
    def small(name: str, method: str, **given: int) -> VPDConfig:
        settings = recipe(name, method, **given)
        gamma = settings.gamma.model_copy(update={"d_ci": 8, "n_blocks": 1, "n_heads": 2, "hidden": 2})
        return settings.model_copy(update={"C": 4, "batch_size": 2, "gamma": gamma})

    monkeypatch.setattr(runner, "recipe", small)
    entry = command("--toy", toy, "--method", method, "--steps", "2")[toy][method]
    truth = TOYS[toy].truth(TOYS[toy].build())
    assert set(entry["latents"]) == set(truth.latents) and set(entry["needed"]) == set(truth.needed)
    assert bool(truth.latents) != bool(truth.needed)
    assert all(":" in result["subcomponent"][0] for result in entry["latents"].values())
    for result in (*entry["latents"].values(), *entry["needed"].values()):
        assert 0 <= result["overlap"][0] <= 1 and 0 <= result["chance"][0] <= 1
    assert entry["true"] == {} and "mmcs" not in entry and entry["reconstruction"]["zero"][0] > 0


def test_every_toy_has_a_recipe_of_vpd_and_its_steps_and_seed_can_be_set():
    for name in TOYS:
        settings = recipe(name, "vpd", seed=7, steps=11)
        assert (
            isinstance(settings, VPDConfig)
            and (settings.seed, settings.steps) == (7, 11)
            and settings.coefficients.adversarial > 0
        )
        assert settings.output == TOYS[name].output
        assert recipe(name, "vpd").model_copy(update={"seed": 7, "steps": 11}) == settings
    for name in ("induction", "grammar"):
        settings = recipe(name, "spd")
        assert (
            settings.output == "kl" and settings.coefficients.layerwise == 1 and settings.coefficients.adversarial == 0
        )
    assert recipe("tms_5_2", "spd").coefficients.adversarial == 0 and recipe("compressed", "spd").minimality.p == (
        (0, 2),
        (1, 2),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tms_6", "vpd"), "no toy 'tms_6'"),
        (("tms_5_2", "sae"), "no method 'sae'"),
        (("grammar", "apd"), "APD has no recipe for grammar"),
        (("compressed", "apd"), "APD has no recipe for compressed"),
    ],
)
def test_what_there_is_not_is_said(arguments, message):
    with pytest.raises((KeyError, ValueError), match=message):
        recipe(*arguments)


def test_published_scores_stand_beside_a_methods_own(command):
    result = command("--toy", "tms_5_2", "--method", "spd", "vpd", "--steps", "2")
    table = results.table(result)
    assert table["method"].tolist() == ["spd", "spd, published", "vpd"]
    published = table[table["method"] == "spd, published"].iloc[0]
    assert (published["mmcs"], published["ml2r"]) == (1.0, 0.993) and published.isna()["seed"]
    # Table 1 of the SPD paper, in its order.
    assert [PUBLISHED[toy]["spd"]["ml2r"] for toy in ("tms_5_2", "tms_40_10", "tms_5_2_id", "tms_40_10_id")] == [
        (0.993, 0.002),
        (1.010, 0.007),
        (0.992, 0.010),
        (1.031, 0.001),
    ]
    assert set(PUBLISHED) <= set(TOYS) and all(set(methods) <= set(METHODS) for methods in PUBLISHED.values())


def test_settings_stored_flat_by_earlier_entries_are_the_recipes_own():
    for toy, methods in results.read(ROOT / results.RESULTS).items():
        for method, entries in methods.items():
            settings = recipe(toy, method).model_dump(mode="json", exclude={"seed"})
            assert results.is_measured(ROOT / results.RESULTS, toy, method, entries["seed"][0], settings)


def test_help_estimates_the_time(capsys):
    with pytest.raises(SystemExit):
        runner.main(["--help"])
    said = capsys.readouterr().out
    header, *rows = said[said.index("minutes on one core") :].splitlines()
    assert header.split()[-len(METHODS) :] == list(METHODS)
    estimates = {cells[0]: cells[1:] for row in rows if (cells := row.split()) and cells[0] in TOYS}
    assert set(estimates) == set(TOYS)
    for name, (target, *minutes) in estimates.items():
        assert float(target) > 0 and len(minutes) == len(METHODS)
        for method, estimate in zip(METHODS, minutes, strict=True):
            if estimate == "-":
                with pytest.raises(ValueError, match="has no recipe"):
                    recipe(name, method)
            else:
                recipe(name, method)
