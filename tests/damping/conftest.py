"""Fixtures of the tests of dampings."""

import pytest
import torch


@pytest.fixture
def decomposed(monkeypatch):
    """Shapes that were decomposed so far, one for each call."""
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(tuple(m.shape)) or eigh(m))
    return calls
