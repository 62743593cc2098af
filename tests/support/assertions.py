"""What is compared, and how closely."""

import torch

from tests.support import oracles


def assert_close(actual, expected, rtol, where=""):
    assert actual.shape == expected.shape, where
    difference = float(torch.linalg.norm(actual - expected))
    assert difference <= rtol * max(float(torch.linalg.norm(expected)), 1e-12), (where, difference)


def assert_blocks_are(fisher, data, rule, rtol=1e-10):
    """``rule`` makes the matrix of a Kronecker block's data; all others are diagonal."""
    assert list(fisher) == list(data)
    for name, block in fisher.items():
        expected = oracles.diagonal(data[name].X) if data[name].block.diagonal else rule(data[name])
        assert tuple(block.shape) == data[name].X.shape[2:]
        assert_close(block.to_dense(), expected, rtol, name)
        torch.testing.assert_close(block.trace(), expected.trace(), rtol=max(rtol, 1e-10), atol=1e-13)


def errors(fisher, data):
    """Relative Frobenius error of every Kronecker block."""
    found = {}
    for name, d in data.items():
        F = oracles.exact_block(d.X)
        if not d.block.diagonal and torch.linalg.norm(F) > 1e-12:
            found[name] = oracles.error(fisher[name].to_dense(), F)
    return found


def assert_no_worse(actual, *others, factor=1.0):
    """Errors, block by block, are at most ``factor`` times the smallest of the others' (and rounding)."""
    for name, value in actual.items():
        best = min(other[name] for other in others)
        assert value <= factor * best * (1 + 1e-6) + 1e-7, (name, value, best)
