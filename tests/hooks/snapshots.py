"""Everything about a model that a plugin could leave changed."""

from __future__ import annotations

import torch


def snapshot(model):
    """Everything about a model that a plugin could leave changed."""
    return {
        "hook_dict": {k: id(v) for k, v in model.hook_dict.items()},
        "mod_dict": {k: id(v) for k, v in model.mod_dict.items()},
        "modules": {k: id(v) for k, v in model.named_modules()},
        "children": {k: list(m._modules) for k, m in model.named_modules()},
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "hooks": {k: tuple(map(tuple, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._forward_hooks_with_kwargs,
                                       m._forward_pre_hooks_with_kwargs, m._forward_hooks_always_called)))
                  for k, m in model.named_modules()},
        "users": {k: [getattr(h, "user_hook", h.hook.id) for h in (*p.fwd_hooks, *p.bwd_hooks)]
                  for k, p in model.hook_dict.items()},
        "training": {k: m.training for k, m in model.named_modules()},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "attributes": set(vars(model)),
        "context_level": model.context_level,
    }  # fmt: skip


def assert_same(before, after):
    for key in before:
        if key in ("state", "grads"):
            assert before[key].keys() == after[key].keys()
            for k, v in before[key].items():
                assert (v is None and after[key][k] is None) or torch.equal(v, after[key][k]), (key, k)
        else:
            assert before[key] == after[key], key
