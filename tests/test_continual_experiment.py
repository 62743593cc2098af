"""The experiment with tasks one after another runs, at sizes at which it measures nothing, and its scores are right."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments import continual
from tests.support.tables import lines

pytestmark = pytest.mark.usefixtures("same_threads")

NAN = math.nan
# Test accuracies of tasks 1 to 3, one row after each task; the second is best only after the third.
ACCURACIES = np.array([[0.9, NAN, NAN], [0.5, 0.6, NAN], [0.6, 0.8, 1.0]])


@pytest.fixture
def digits():
    x = torch.arange(12.0).reshape(4, 3)
    return continual.Digits(x, torch.tensor([0, 1, 2, 3]), torch.tensor([[2, 0, 1], [1, 2, 0]]))


def run_with(accuracies):
    return continual.Run(np.asarray(accuracies), *np.zeros((3, len(accuracies))))


def test_average_accuracy():
    np.testing.assert_allclose(continual.average_accuracy(ACCURACIES), [0.9, 0.55, 0.8], rtol=1e-12)


def test_forgetting():
    np.testing.assert_allclose(continual.forgetting(ACCURACIES), [0.0, 0.2, 0.1], rtol=1e-12, atol=1e-15)


def test_a_diverged_run_has_no_scores_and_is_never_the_best():
    diverged = np.array([[0.9, NAN], [NAN, NAN]])
    assert np.isnan(continual.average_accuracy(diverged)).tolist() == [False, True]
    assert np.isnan(continual.forgetting(diverged)).tolist() == [False, True]
    fine = run_with([[0.9, NAN], [0.1, 0.2]])
    better = run_with([[0.9, NAN], [0.2, 0.2]])
    runs = {("EWC", 1.0): run_with(diverged), ("EWC", 2.0): fine, ("EWC", 3.0): better, ("EWC", 4.0): fine}
    assert continual.best_of(runs) == {"EWC": (3.0, better)}
    (line,) = continual.grid_lines(runs, continual.best_of(runs))
    assert line == "EWC, average accuracy by strength: 1: nan, 2: 0.1500, 3: 0.2000, 4: 0.1500; best 3"
    del runs["EWC", 4.0]
    assert continual.grid_lines(runs, continual.best_of(runs))[0].endswith("best 3, at the edge of the grid")


def test_every_task_has_its_order_of_pixels(digits):
    (first, of_first), (second, _) = (next(iter(continual.InOrder(digits, task, 3))) for task in (0, 1))
    assert first.tolist() == [[2, 0, 1], [5, 3, 4], [8, 6, 7]]
    assert second.tolist() == [[1, 2, 0], [4, 5, 3], [7, 8, 6]]
    assert of_first.tolist() == [0, 1, 2]
    data = continual.InOrder(digits, 1, 3)
    assert [len(y) for _, y in data] == [3, 1]
    assert len(data) == 2


def test_an_epoch_has_each_example_of_each_task_once(digits):
    epoch = list(digits.shuffled(range(2), 3, torch.Generator().manual_seed(0)))
    x = torch.cat([x for x, _ in epoch])
    expected = torch.cat([digits.x[:, order] for order in digits.orders])
    assert sorted(x.tolist()) == sorted(expected.tolist())
    assert torch.cat([y for _, y in epoch]).equal(x.min(1).values.long() // 3)
    (second,) = digits.shuffled(range(1, 2), 4, torch.Generator().manual_seed(0))
    assert sorted(second[0].tolist()) == expected[4:].tolist()


def test_penalty_belongs_to_the_sum_over_the_tasks_examples(digits):
    """One step of gradient descent under the penalty, against the gradient of the mean of all examples' terms."""
    torch.manual_seed(0)
    model = continual.network(3)
    weight, start = model[0].weight, model[0].weight.detach().clone()
    seen = []

    def penalty():
        seen.append(1)
        return 1e6 * (weight - start - 1).pow(2).sum()

    args = SimpleNamespace(lr=1e-3, epochs=2, batch_size=2)
    gradients = []
    weight.register_hook(gradients.append)
    continual.learn(model, digits, range(1), penalty, args, seed=0)
    assert len(seen) == 4
    torch.testing.assert_close(gradients[0], torch.full_like(start, -2e6 / 4), rtol=1e-4, atol=0)


def test_program(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("KRONLAPLACE_DATA", raising=False)
    monkeypatch.setattr(continual, "WIDTH", 6)
    methods = ["none", "EWC", "K-FAC, factors", "K-FOC, kfoc", "joint"]
    sizes = ["--tasks", "3", "--examples", "40", "--epochs", "1", "--batch-size", "20", "--strengths", "1", "5"]
    options = [*sizes, "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]
    continual.main([*options, "--methods", *methods])

    table = lines(tmp_path / "continual.csv")
    assert [line["method"] for line in table] == methods
    assert list(table[0]) == ["method", *(column.key for column in continual.COLUMNS)]
    rows = lines(tmp_path / "tasks.csv")
    assert list(rows[0]) == ["method", "strength", "tasks", *continual.SERIES]
    assert len(rows) == 3 * (1 + 3 * 2 + 1)
    assert len(lines(tmp_path / "accuracies.csv")) == 6 * (1 + 3 * 2 + 1)

    sizes = {}
    for row in rows:
        sizes.setdefault(row["method"], []).append(int(row["bytes"]))
    assert sizes["none"] == [0, 0, 0]
    assert sizes["joint"] == [40 * (64 * 4 + 8) * t for t in (1, 2, 3)]
    assert len(set(sizes["K-FAC, factors"])) == len(set(sizes["K-FOC, kfoc"])) == 1
    assert sizes["EWC"][0] < sizes["EWC"][1] < sizes["EWC"][2]
    first = {float(row["accuracy"]) for row in rows if row["tasks"] == "1" and row["method"] not in ("none", "joint")}
    assert len(first) == 1  # before the second task there is the prior only, for all

    out, markdown = capsys.readouterr().out, (tmp_path / "continual.md").read_text(encoding="utf-8")
    for text in (out, markdown):
        assert "K-FOC, kfoc, average accuracy by strength: 1: " in text
        assert "consolidation seconds, by number of tasks" in text
    assert (tmp_path / "continual.png").exists()


def test_a_diverging_run_ends_without_an_error(tmp_path, monkeypatch):
    monkeypatch.delenv("KRONLAPLACE_DATA", raising=False)
    monkeypatch.setattr(continual, "WIDTH", 4)
    options = [
        "--tasks",
        "2",
        "--examples",
        "20",
        "--epochs",
        "1",
        "--lr",
        "1e30",
        "--strengths",
        "1",
        "--out",
        str(tmp_path),
    ]
    continual.main([*options, "--methods", "EWC", "--threads", "1", "--device", "cpu"])
    assert [line["accuracy"] for line in lines(tmp_path / "tasks.csv")] == ["nan", "nan"]
