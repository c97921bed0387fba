"""What a custom model is refused for, by name and with the remedy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tl_vpd
from tl_vpd.adapters import Unsupported, adapt

from .custom_models import Wrapped, normal, seeded, two_layers, untrained


def whole_numbers():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def test_what_cannot_be_decomposed_is_listed_with_the_reason():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    model = Wrapped(
        lambda s, x: s.fc(s.attention(x, x, x)[0]), whole=whole_numbers(), attention=attention, fc=nn.Linear(4, 3)
    )
    adapter = adapt(model)
    assert list(adapter.sites) == ["fc"]
    assert adapter.refused == {
        "whole": "its weight is torch.int8: load the model unquantised",
        "attention.out_proj": "inside nn.MultiheadAttention, which computes past it",
    }
    assert adapter.dtype == torch.float32  # not that of the first parameter
    vpd, x = untrained(model).float(), torch.randn(2, 5, 4)
    clean = model(x)
    with vpd.attach(model) as attached:
        with attached.masked("unmasked", delta=1.0):
            assert torch.equal(model(x), clean)
        with torch.no_grad(), attached.masked("zero"):
            assert_close(model(x), model.fc.bias.expand(2, 5, 3))
    with pytest.raises(KeyError, match="No site matches 'whole'"):
        untrained(model, sites=["whole"])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, r"has no weight that can be decomposed\. It has no layers"),
        ({"embed": nn.Embedding(3, 4)}, r"has no weight that can be decomposed"),
        ({"a": nn.MultiheadAttention(4, 2)}, r"a\.out_proj: inside nn\.MultiheadAttention"),
        ({"a": whole_numbers()}, r"a: its weight is torch\.int8"),
    ],
)
def test_a_model_without_a_layer_to_decompose_is_refused(layers, message):
    with pytest.raises(Unsupported, match=message):
        adapt(Wrapped(lambda s, x: x, **layers))


def test_a_plain_module_is_refused_by_class():
    for call in (adapt, tl_vpd.sites, untrained(two_layers()).attach):
        with pytest.raises(TypeError, match=r"A Sequential cannot be decomposed.*custom HookedRootModule"):
            call(nn.Sequential(nn.Linear(4, 4)))


def test_a_layer_that_runs_twice_or_never_is_said_at_the_passes_end():
    twice = seeded(lambda: Wrapped(lambda s, x: s.a(s.a(x)), a=nn.Linear(4, 4)))
    never = seeded(lambda: Wrapped(lambda s, x: s.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)))
    reasons = ("a 2 times; a layer that a model uses several times", "b 0 times; the model does not compute")
    for model, message in zip((twice, never), reasons, strict=True):
        vpd, x = untrained(model), normal(3, 4)
        with pytest.raises(RuntimeError, match=message):
            vpd.causal_importances(model, x)
        with vpd.attach(model) as attached:
            with attached.paused():
                model(x)
            for context in (
                attached.masked("unmasked"),
                attached.masked("ci"),
                attached.masked("adversarial", steps=1),
            ):
                with context, pytest.raises(RuntimeError, match=message):
                    model(x)
            with pytest.raises(RuntimeError, match=message):
                model(x)


def test_one_layer_under_two_names_is_refused_by_name():
    shared = nn.Linear(4, 4)
    model = seeded(lambda: Wrapped(lambda s, x: s.c(s.b(s.a(x))), a=shared, b=shared, c=nn.Linear(4, 3)))
    adapter, x = adapt(model), normal(3, 4)
    reasons = {n: f"one module with {o}: give each its copy (copy.deepcopy)" for n, o in (("a", "b"), ("b", "a"))}
    assert list(adapter.sites) == ["c"] and adapter.refused == reasons
    vpd, clean = untrained(model), model(x)
    with vpd.attach(model) as attached, attached.masked("zero"):
        assert_close(model(x), model.c.bias.expand(3, 3))
    assert torch.equal(model(x), clean)
    with pytest.raises(Unsupported, match=r"a: one module with b: give each its copy"):
        adapt(Wrapped(lambda s, x: s.b(s.a(x)), a=shared, b=shared))


def test_inputs_of_other_kinds_are_said():
    model = two_layers()
    vpd = untrained(model)
    with pytest.raises(TypeError, match="The input is a str; a TwoLayers takes a tensor"):
        vpd.causal_importances(model, "def f(x):")
    with pytest.raises(ValueError, match=r"must all be \[batch, pos, d_in\] or all \[batch, d_in\]"):
        vpd.causal_importances(model, normal(2, 3, 5, 4))
    pooled = seeded(lambda: Wrapped(lambda s, x: s.b(s.a(x).mean(1)), a=nn.Linear(4, 4), b=nn.Linear(4, 3)))
    vpd = untrained(pooled)
    with pytest.raises(ValueError, match=r"a \(2, 5, 4\), b \(2, 4\).*sites of one kind"):
        vpd.causal_importances(pooled, normal(2, 5, 4))
    with (
        vpd.attach(pooled) as attached,
        attached.masked("rounded"),
        pytest.raises(ValueError, match="sites of one kind"),
    ):
        pooled(normal(2, 5, 4))
    with torch.no_grad(), vpd.attach(pooled) as attached, attached.masked("zero"):  # which needs no Γ
        assert_close(pooled(normal(2, 5, 4)), pooled.b.bias.expand(2, 3))


def test_an_adversary_needs_one_tensor_to_attack():
    model = seeded(lambda: Wrapped(lambda s, x: (s.a(x), x), a=nn.Linear(4, 4)))
    vpd, x = untrained(model), normal(3, 4)
    with vpd.attach(model) as attached:
        with attached.masked("rounded"):
            assert len(model(x)) == 2
        with pytest.raises(TypeError, match="must be a tensor and is a tuple"), attached.masked("adversarial", steps=1):
            model(x)
    with pytest.raises(TypeError, match="A Wrapped returns a tuple; one tensor is needed"):
        vpd.adversarial_masks(model, x, steps=1)
