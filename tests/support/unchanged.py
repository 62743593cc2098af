"""Whether a network is as it was."""

import pickle

import torch


def everything(model):
    """All that could have been changed, as comparable values."""
    return {
        "pickle": pickle.dumps(model),
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "modules": [
            (
                name,
                m.training,
                sorted(vars(m)),
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._backward_hooks),
            )
            for name, m in model.named_modules()
        ],
        "flags": [
            (name, p.requires_grad, p.grad is None, len(p._backward_hooks or ()))
            for name, p in model.named_parameters()
        ],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


def assert_unchanged(model, before):
    after = everything(model)
    assert after["pickle"] == before["pickle"]
    assert after["modules"] == before["modules"]
    assert after["flags"] == before["flags"]
    for a, b in zip(after["grads"], before["grads"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())
