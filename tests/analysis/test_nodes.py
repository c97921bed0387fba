"""Addresses of nodes, there and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_vpd.analysis.nodes import Node
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
    with pytest.raises(ValueError, match="names no single subcomponent"):
        _ = Node("blocks.0.hook_mlp_out").subcomponent
