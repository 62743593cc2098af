"""The experiments run, at sizes at which they measure nothing."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kronlaplace as kl
from experiments import (
    classification_tasks,
    fit_cost,
    huge_layers,
    inversion_cost,
    large_factors,
    main_path,
    main_path_methods,
    measure,
    predict_cost,
    small_tables,
    variational,
)
from kronlaplace.demo.data import RegressionData
from kronlaplace.demo.training import Recipe


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
def test_large_factors(tmp_path, monkeypatch, capsys):
    def network():
        return nn.Sequential(nn.Linear(40, 5), nn.ReLU(), nn.Linear(5, 3))

    monkeypatch.setitem(large_factors.NETWORKS, "tiny", (network, (40,), 12, 3, {"sampling": "exact"}))
    monkeypatch.setattr(large_factors, "choices", lambda rank: {"whole": None, "truncated": kl.Truncation(20, rank)})
    large_factors.main(["--networks", "tiny", "--rank", "15", "--out", str(tmp_path)])
    rows = table(tmp_path / "tiny.csv")
    assert list(rows) == ["whole", "truncated"]
    assert float(rows["whole"]["evidence"]) == 0
    assert 0 < float(rows["truncated"]["evidence"]) < 1e-4
    assert "tiny" in capsys.readouterr().out


@pytest.mark.grid
def test_inversion_cost(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(inversion_cost.SHAPES, "tiny", [(2, 3), (3, 2), (4, 4)])
    inversion_cost.main(["--shapes", "tiny", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)])
    rows = table(tmp_path / "tiny.csv")
    assert list(rows) == list(inversion_cost.METHODS)
    assert float(rows[inversion_cost.PLAIN]["time_ratio"]) == 1
    assert "tiny, 3 layers" in capsys.readouterr().out
    assert (tmp_path / "inversion_cost.png").exists()


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


@pytest.mark.slow
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


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.filterwarnings("ignore:the evidence is largest at the edge")
def test_main_path(tmp_path, monkeypatch, capsys, n_classes):
    inputs, labels = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).numpy(), np.arange(40) % n_classes

    def network():
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1 if n_classes == 2 else 3))

    def data(data_dir, seed):
        return classification_tasks.table("tiny", inputs, labels, seed)

    task = classification_tasks.Task("tiny table", data, network, Recipe(20, 8, 1e-2), split_by_seed=True)
    monkeypatch.setitem(classification_tasks.TASKS, "tiny", task)
    folders = ["--cache", str(tmp_path / "networks"), "--out", str(tmp_path / "out")]
    own = [method for method in main_path.METHODS if "laplace-torch" not in method]
    main_path.main(["--sets", "tiny", "--seeds", "2", "--methods", *own, *folders])
    rows = main_path.read_rows(tmp_path / "out" / "tiny.csv")
    assert list(rows) == own
    assert all(list(by_seed) == [0, 1] for by_seed in rows.values())
    assert "| tiny |" in (tmp_path / "out" / "main_path.md").read_text(encoding="utf-8")
    networks = {path: path.stat().st_mtime_ns for path in (tmp_path / "networks").iterdir()}
    assert len(networks) == 2 * (main_path_methods.N_ENSEMBLE + 1)

    main_path.main(["--sets", "tiny", "--seeds", "1", "--methods", "temperature scaling", *folders])
    again = main_path.read_rows(tmp_path / "out" / "tiny.csv")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "networks").iterdir()} == networks
    assert list(again) == own
    assert again["temperature scaling"][0].scores[:-1] == rows["temperature scaling"][0].scores[:-1]
    assert again[main_path.MAP] == rows[main_path.MAP]


def test_bounds_of_the_main_path():
    def rows(**methods):
        keys = [column.key for column in main_path.SCORES]
        default = {"accuracy": 0.9, "confidence": 0.9, "nll": 0.4, "ece": 0.02, "auroc": 0.7}
        return {
            name: {
                seed: main_path.Row(tuple((default | changes).get(key, 0.0) for key in keys))
                for seed, changes in enumerate(by_seed)
            }
            for name, by_seed in methods.items()
        }

    def compared(base, *by_seed):
        return main_path.compared(rows(MAP=[base] * len(by_seed), other=by_seed), "other")

    assert compared({}, {"nll": 0.419, "ece": 0.029, "auroc": 0.71}).missed == ()
    assert str(compared({}, {"nll": 0.44, "ece": 0.035})) == "1.100, +0.0150, +0.0000: misses NLL, ECE, AUROC"
    overconfident = {"confidence": 0.95, "ece": 0.05}
    better = {"nll": 0.3, "ece": 0.02, "auroc": 0.8}
    assert str(compared(overconfident, better, better)) == "0.750, -0.0300, +0.1000: met"
    assert compared(overconfident, better, better | {"nll": 0.41}).missed == ("NLL",)
    assert compared({}, {"nll": float("nan")}) is None


def test_two_outputs_that_differ_by_a_logit():
    layer, x = nn.Linear(3, 1), torch.randn(5, 3)
    torch.testing.assert_close(main_path_methods.two_outputs(layer)(x).softmax(dim=1)[:, 1:], layer(x).sigmoid())


def test_small_tables_measure_what_they_say():
    """The MAP's row is the Gaussian density at the training error, in original units; the default's gain is paired."""
    torch.manual_seed(0)
    inputs = torch.randn(40, 2)
    targets = inputs[:, 0].sin() + 0.1 * torch.randn(40)
    splits = [(np.arange(30), np.arange(30, 40))]
    split = RegressionData(
        "toy", "a toy", inputs.numpy().astype(float), 5 * targets.numpy().astype(float), splits
    ).split(0)
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).eval()
    scores = small_tables.scores_of(split, model)
    assert list(scores) == list(small_tables.METHODS)
    error = (model(split.train_x) - split.train_y).square().mean().sqrt().item()
    density = torch.distributions.Normal(model(split.test_x), error).log_prob(split.test_y).mean().item()
    assert scores["MAP"] == pytest.approx(density - np.log(split.target_std), rel=1e-4)
    one = {
        "MAP": -3.0,
        "noise left at the training error": -2.0,
        "K-FAC, its own evidence": -2.5,
        "no option set": -1.9,
    }
    other = {
        "MAP": -1.0,
        "noise left at the training error": -2.2,
        "K-FAC, its own evidence": -2.5,
        "no option set": -1.8,
    }
    by_rows, gains = small_tables.tables_of({50: {"toy": [one, other]}}, ["toy"])
    np.testing.assert_allclose(by_rows[50].scores["no option set"], [[-1.9], [-1.8]])
    np.testing.assert_allclose(gains.scores["50 rows"], [[1.1], [-0.8]])  # to the MAP, whose mean is the largest


def test_huge_layers(tmp_path, monkeypatch):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is read from /proc")
    for name in ("words", "inputs"):
        monkeypatch.setattr(huge_layers, "ROWS", 60)
        assert len(huge_layers.cost(name, 60)) == len(huge_layers.COST)
    matrix = torch.diag(torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.1)
    monkeypatch.setattr(huge_layers, "sides", lambda data_dir: [("m", matrix, 10)])
    assert huge_layers.main(["--networks", "--out", str(tmp_path)]) == 0
    found = table(tmp_path / "accuracy.csv")
    assert set(found) == {
        f"m: {kind}" for kind in ("diagonal", "32 columns", "128 columns", "512 columns", "what is taken")
    }
    assert float(found["m: what is taken"]["error 1.0"]) < 0.01
