"""The experiments that measure costs run, at sizes at which they measure nothing."""

import csv

import pytest
import torch
from torch import nn

import kronlaplace as kl
from experiments import fit_cost, measure, predict_cost, variational


def table(path):
    with path.open(encoding="utf-8") as file:
        return {line.pop("method"): line for line in csv.DictReader(file)}


def test_peak_and_largest_tensor_of_a_call():
    def call():
        a = torch.ones(1000)
        b = a + 1
        del a
        return torch.cat([b, b])

    assert measure.peak_bytes(call) == 12_000
    assert measure.largest_bytes(call) == 8_000


def test_runs_take_turns():
    calls = []
    runs = {
        "a": measure.Run(lambda: calls.append("a"), 3),
        "b": measure.Run(lambda: calls.append("b"), 1, before=lambda: calls.append("before b")),
    }
    times = measure.in_turn(runs)
    assert calls == ["a", "before b", "b", "a", "a"]
    assert [len(times[name]) for name in runs] == [3, 1]
    assert measure.ratio([2.0, 6.0, 9.0], [1.0, 2.0]) == 2.5


@pytest.mark.grid
def test_fit_cost(tmp_path, monkeypatch, capsys):
    def network():
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 10))

    monkeypatch.setitem(fit_cost.NETWORKS, "tiny", (network, (4,), 12, 4))
    fit_cost.main(["--networks", "tiny", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)])
    rows = table(tmp_path / "tiny.csv")
    assert list(rows) == list(fit_cost.METHODS)
    assert float(rows[fit_cost.PLAIN]["time_ratio"]) == float(rows[fit_cost.PLAIN]["memory_ratio"]) == 1
    assert "K-FOC, running" in capsys.readouterr().out


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:the evidence is largest at the edge")  # the digits are noise
def test_predict_cost(tmp_path, capsys):
    sizes = {"repeats": 1, "digits": 12, "test-digits": 4, "batch-size": 2, "features": 6, "classes": 20}
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    predict_cost.main([*options, "--skip-peer", "--device", "cpu", "--out", str(tmp_path)])
    for name in predict_cost.TITLES:
        rows = table(tmp_path / f"{name}.csv")
        assert all(float(value) > 0 for row in rows.values() for key, value in row.items() if key in ("seconds", "ms"))
    assert "laplace-torch left out" in capsys.readouterr().out
    largest = float(table(tmp_path / "last_layer.csv")["head alone, functional_variance"]["largest_mb"])
    assert 2 * 20 * 4 / 1e6 <= largest < 2 * 20 * 20 * 7 * 4 / 1e6
    assert (tmp_path / "predict_cost.png").exists()


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:the evidence is largest at the edge")  # the digits are noise
def test_variational(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(variational, "ESTIMATORS", {"K-FAC": kl.KFAC(), "exact blocks": kl.ExactBlock()})
    sizes = {"steps": 300, "digits": 12, "batch-size": 4, "repeats": 1}
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    variational.main([*options, "--out", str(tmp_path)])
    for name in variational.TABLES:
        rows = {key: {k: float(v) for k, v in row.items()} for key, row in table(tmp_path / f"{name}.csv").items()}
        best = rows.pop("dense, variational")
        assert abs(best["divergence"]) < 1e-6
        assert all(row["divergence"] > 0 and row["bound"] < best["bound"] for row in rows.values())
        assert rows["exact blocks, variational"]["divergence"] < rows["exact blocks, plain"]["divergence"] / 2
    assert float(table(tmp_path / "cost.csv")[variational.PLAIN]["time_ratio"]) == 1
    assert "variational, two rounds" in capsys.readouterr().out
    assert (tmp_path / "variational.png").exists()
