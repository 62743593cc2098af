"""The log says what was computed and with which blocks, and is silent unless a program asks for it."""

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

import kronlaplace as kl


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double().eval()


@pytest.fixture
def data():
    return [(torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,)))]


def test_what_was_computed_is_logged(model, data, caplog):
    with caplog.at_level(logging.INFO, logger="kronlaplace"):
        posterior = kl.KronLaplace(model, "classification").fit(data)
        posterior.tune(logit_scale="fixed")
    estimated, fitted, tuned = caplog.messages
    blocks = "blocks: 2 kfac kronecker, 1 diagonal; 100.0% of the parameters"
    assert estimated.startswith(f"estimated the Fisher of 6 examples: {blocks}")
    assert fitted.startswith(f"fitted the posterior; {blocks}")
    assert tuned.startswith(f"tuned to {posterior.hyperparameters}")
    assert {record.name for record in caplog.records} == {"kronlaplace"}


def test_what_fails_is_not_logged(model, caplog):
    with caplog.at_level(logging.INFO, logger="kronlaplace"), pytest.raises(ValueError):
        kl.estimate_fisher(model, [], "classification")
    assert not caplog.messages


def test_nothing_is_described_unless_asked_for(model, data, monkeypatch):
    monkeypatch.setattr(kl.Coverage, "summary", lambda self: pytest.fail("nobody asked"))
    kl.KronLaplace(model, "classification").fit(data)


def test_importing_the_package_configures_no_logger():
    code = "import logging, kronlaplace; log = logging.getLogger('kronlaplace'); print(log.handlers, log.level)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[] 0\n"
