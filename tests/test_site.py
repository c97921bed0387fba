"""Names of sites and subcomponents, patterns, and the concatenated axis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_vpd.site import ConcatenatedAxis, Site, Subcomponent, by_pattern, nearest, select

NAMES = ["blocks.0.attn.W_Q", "blocks.0.attn.W_K", "blocks.0.mlp.W_in", "blocks.1.attn.W_Q", "blocks.10.mlp.W_out"]


def test_a_site_knows_its_layer_short_name_rank_and_hooks():
    site = Site("blocks.10.mlp.W_out", 12, 8)
    assert (site.layer, site.short, site.rank) == (10, "out", 8)
    assert site.hook_name("component_acts") == "blocks.10.hook_out_component_acts"
    assert [Site(f"blocks.0.attn.W_{c}", 8, 8).short for c in "QKVO"] == ["q", "k", "v", "o"]


@pytest.mark.parametrize(
    ("name", "layer", "short", "hook"),
    [
        ("linear1", None, "linear1", "linear1.hook_ci"),
        ("layers.3.mlp_in", 3, "mlp_in", "layers.3.mlp_in.hook_ci"),
        ("encoder.fc", None, "fc", "encoder.fc.hook_ci"),
        ("blocks.0.attn.W_X", 0, "W_X", "blocks.0.attn.W_X.hook_ci"),
    ],
)
def test_a_site_of_ones_own_model_bears_its_path(name, layer, short, hook):
    site = Site(name, 8, 8)
    assert (site.layer, site.short, site.hook_name("ci")) == (layer, short, hook)


def test_subcomponents_are_read_written_and_ordered():
    parsed = Subcomponent.parse("blocks.1.attn.W_Q:316")
    assert (parsed.site, parsed.index, str(parsed)) == ("blocks.1.attn.W_Q", 316, "blocks.1.attn.W_Q:316")
    assert Subcomponent.parse(parsed) is parsed
    assert Subcomponent("a", 2) < Subcomponent("a", 10) < Subcomponent("b", 0)


@pytest.mark.parametrize(
    "text", ["blocks.1.attn.W_Q", "blocks.1.attn.W_Q:", "blocks.1.attn.W_Q:-1", "a:b", "", "a:1.5"]
)
def test_what_is_no_subcomponent_is_refused(text):
    with pytest.raises(ValueError, match="write 'site:index'"):
        Subcomponent.parse(text)


def test_an_index_below_0_is_refused():
    with pytest.raises(ValueError, match="index=-1: give an integer of at least 0"):
        Subcomponent("a", -1)


def test_an_index_of_thousands_of_digits_is_refused_as_an_address():
    with pytest.raises(ValueError, match=r"write 'site:index'") as refused:
        Subcomponent.parse("a:" + "9" * 5000)
    assert len(str(refused.value)) < 200


def test_no_patterns_are_not_all_sites():
    with pytest.raises(ValueError, match="The list of sites is empty: give one pattern or more"):
        select([], NAMES)


def test_select_keeps_the_order_of_the_names():
    assert select(None, NAMES) == NAMES
    assert select("blocks.*.attn.W_Q", NAMES) == ["blocks.0.attn.W_Q", "blocks.1.attn.W_Q"]
    assert select(["*.W_in", "*.W_[QK]"], NAMES) == NAMES[:4]


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name():
    with pytest.raises(
        KeyError, match=r"No site matches 'blocks\.0\.attn\.W_q' \(did you mean 'blocks\.0\.attn\.W_Q'\?\)\."
    ):
        select(["*.W_in", "blocks.0.attn.W_q"], NAMES)


def test_an_exact_name_beats_a_pattern_in_either_order():
    expected = {n: 1 if n == NAMES[0] else 2 for n in NAMES}
    assert by_pattern({NAMES[0]: 1, "*": 2}, NAMES, what="C") == expected
    assert by_pattern({"*": 2, NAMES[0]: 1}, NAMES, what="C") == expected


@pytest.mark.parametrize("reverse", [False, True])
def test_the_pattern_that_matches_fewer_sites_wins_in_any_order(reverse):
    values = {"*.W_[QK]": 64, "*": 256, "blocks.1.attn.*": 8}  # 3, 5 and 1 of the names
    if reverse:
        values = dict(reversed(values.items()))
    expected = {name: 64 if name.endswith(("W_Q", "W_K")) else 256 for name in NAMES} | {"blocks.1.attn.W_Q": 8}
    assert by_pattern(values, NAMES, what="C") == expected
    assert list(by_pattern(values, NAMES, what="C")) == NAMES


def test_equally_specific_patterns_that_disagree_are_ambiguous_and_those_that_agree_are_not():
    disagree = {"*.W_Q": 1, "blocks.0.attn.*": 2, "*": 3}
    with pytest.raises(
        ValueError, match=r"C of blocks\.0\.attn\.W_Q is ambiguous: '\*\.W_Q' says 1.*each matches 2 sites"
    ):
        by_pattern(disagree, NAMES, what="C")
    named = by_pattern({**disagree, "blocks.0.attn.W_Q": 4}, NAMES, what="C")
    assert [named[name] for name in NAMES[:3]] == [4, 2, 3]
    assert set(by_pattern({"*.W_Q": 2, "blocks.0.attn.*": 2, "*": 2}, NAMES, what="C").values()) == {2}


def test_a_site_left_without_a_value_is_named():
    with pytest.raises(KeyError, match=r"There is no C for blocks\.0\.mlp\.W_in, blocks\.10\.mlp\.W_out"):
        by_pattern({"*.attn.*": 1}, NAMES, what="C")


def test_nearest_says_nothing_where_nothing_is_near():
    assert nearest("blocks.0.attn.W_Qq", NAMES) == " (did you mean 'blocks.0.attn.W_Q'?)"
    assert nearest("zzz", NAMES) == ""
    assert nearest(NAMES[0], {0: None}) == ""  # keys of a caller's mapping may be anything


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("blocks.0.attn.hook_q", "blocks.0.attn.W_Q"),
        ("blocks.0.hook_k_ci", "blocks.0.attn.W_K"),
        ("blocks.1.attn.q", "blocks.1.attn.W_Q"),
        ("model.layers.0.self_attn.k_proj", "blocks.0.attn.W_K"),
        ("blocks.0.mlp.hook_pre", "blocks.0.mlp.W_in"),
        ("blocks.10.hook_mlp_out", "blocks.10.mlp.W_out"),
    ],
)
def test_the_name_of_a_hook_or_layer_suggests_the_weight_behind_it(name, weight):
    assert nearest(name, NAMES) == f" (did you mean {weight!r}?)"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_packing_places_every_subcomponent_once(counts):
    site_axis = ConcatenatedAxis({f"s{i}": c for i, c in enumerate(counts)})
    concatenated = torch.arange(site_axis.total)[None]
    everyone = list(site_axis.subcomponents())
    assert len(everyone) == site_axis.total == sum(counts)
    for position, address in enumerate(everyone):
        assert site_axis.at(position) == address
        assert int(site_axis.split_sites(concatenated)[address.site][0, address.index]) == position
        assert int(concatenated[0, site_axis.slices[address.site]][address.index]) == position


def test_unpacked_parts_are_views_and_a_position_beyond_the_end_is_refused():
    site_axis = ConcatenatedAxis({"a": 2, "b": 1})
    concatenated = torch.zeros(3, 3)
    site_axis.split_sites(concatenated)["b"].fill_(7)
    assert concatenated[:, 2].tolist() == [7, 7, 7] and concatenated[:, :2].sum() == 0
    for position in (3, -1):
        with pytest.raises(IndexError, match=f"Position {position} is outside the 3 subcomponents"):
            site_axis.at(position)
