"""Addresses of nodes, there and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_vpd.analysis.nodes import Node, position_of
from tl_vpd.site import Subcomponent


@given(
    st.sampled_from(["blocks.1.attn.W_Q", "blocks.0.attn.hook_z", "encoder.linear1", "hook_embed"]),
    st.none() | st.integers(0, 10**6),
    st.none() | st.integers(0, 10**6),
)
def test_a_node_reads_back_what_it_writes(name, index, pos):
    assert Node.parse(str(Node(name, index, pos))) == Node(name, index, pos)


@pytest.mark.parametrize("text", ["", ":3", "a:b", "a:1:2", "a@", "a@1@2", "a@-1", "a:1 @2"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="is not a node"):
        Node.parse(text)


def test_a_subcomponent_is_a_node_at_every_position():
    node = Node.parse(Subcomponent("blocks.1.attn.W_Q", 3))
    assert node == Node("blocks.1.attn.W_Q", 3)
    assert node.subcomponent == Subcomponent("blocks.1.attn.W_Q", 3)
    with pytest.raises(ValueError, match="does not name a single subcomponent"):
        _ = Node("blocks.0.hook_mlp_out").subcomponent


def test_positions_are_one_integer_within_the_prompt():
    assert [position_of(pos, 7) for pos in (0, 6, -1, -7)] == [0, 6, 6, 0]
    for pos in ([6, 7], 1.0, True, None, slice(2)):
        with pytest.raises(TypeError, match="give an integer"):
            position_of(pos, 7)
    for pos in (7, -8):
        with pytest.raises(IndexError, match=f"pos={pos}: the prompt has positions -7 to 6"):
            position_of(pos, 7)
