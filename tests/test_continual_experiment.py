"""The experiment with tasks one after another runs, at sizes at which it measures nothing, and its scores are right."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.cifar_files import BYTES
from experiments.continual import files, problems, report, sequence
from experiments.continual.__main__ import main
from experiments.continual.methods import BY_DEFAULT, METHODS, Method
from experiments.continual.problems import OWN, PROBLEMS, SHARED, Network, Tasks, problem_of
from experiments.continual.sequence import Run
from tests.support.tables import lines

pytestmark = pytest.mark.usefixtures("same_threads")

NAN = math.nan
# Test accuracies of tasks 1 to 3, one row after each task; the second is best only after the third.
ACCURACIES = np.array([[0.9, NAN, NAN], [0.5, 0.6, NAN], [0.6, 0.8, 1.0]])
SMALL = ["--examples", "40", "--epochs", "1", "--batch-size", "20", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.delenv("KRONLAPLACE_DATA", raising=False)
    monkeypatch.setattr(problems, "WIDTH", 6)


@pytest.fixture
def permuted():
    """Two tasks of the same four images of three pixels."""
    rows = torch.arange(4)
    return Tasks(torch.arange(12.0).reshape(4, 3), rows, (rows, rows), torch.tensor([[2, 0, 1], [1, 2, 0]]))


@pytest.fixture(scope="module")
def digits():
    return problems.images("digits", None, "cpu")


def run_with(accuracies, n_bytes=0.0, seconds=0.0):
    """A run with these accuracies."""
    n = len(accuracies)
    return Run(
        np.asarray(accuracies), *(np.broadcast_to(values, n).astype(float) for values in (n_bytes, seconds, seconds))
    )


def test_average_accuracy():
    np.testing.assert_allclose(sequence.average_accuracy(ACCURACIES), [0.9, 0.55, 0.8], rtol=1e-12)


def test_forgetting():
    np.testing.assert_allclose(sequence.forgetting(ACCURACIES), [0.0, 0.2, 0.1], rtol=1e-12, atol=1e-15)


def test_a_diverged_run_has_no_scores_and_is_never_the_best():
    diverged = np.array([[0.9, NAN], [NAN, NAN]])
    assert np.isnan(sequence.average_accuracy(diverged)).tolist() == [False, True]
    assert np.isnan(sequence.forgetting(diverged)).tolist() == [False, True]
    fine = run_with([[0.9, NAN], [0.1, 0.2]])
    better = run_with([[0.9, NAN], [0.2, 0.2]])
    runs = {("EWC", 1.0): [run_with(diverged)], ("EWC", 2.0): [fine], ("EWC", 3.0): [better], ("EWC", 4.0): [fine]}
    assert report.best_of(runs) == {"EWC": (3.0, [better])}
    (line,) = report.grid_lines(runs, report.best_of(runs))
    assert line == "EWC, average accuracy by strength: 1: nan, 2: 0.1500, 3: 0.2000, 4: 0.1500; best 3"
    del runs["EWC", 4.0]
    assert report.grid_lines(runs, report.best_of(runs))[0].endswith("best 3, at the edge of the grid")


def test_the_best_strength_is_that_of_the_mean_over_seeds():
    """One seed alone would choose the other strength."""
    low, middle, high = (run_with([[0.9, NAN], [last, last]]) for last in (0.2, 0.5, 0.6))
    runs = {("EWC", 1.0): [low, high], ("EWC", 2.0): [middle, middle], ("none", 0.0): [low, middle]}
    best = report.best_of(runs)
    assert best["EWC"] == (2.0, [middle, middle])
    last, by_tasks = report.tables_of(best, 2)
    rows = {row[0]: row[1:3] for row in last.cells()}
    assert rows["EWC"] == ["2.00", "0.5000"]
    assert rows["none"] == ["-", "0.3500 ± 0.1500"]
    assert by_tasks["accuracy"].cells()[0] == ["", "after 1", "after 2"]


def test_growth_is_from_the_second_task_on():
    seconds = np.array([100.0, 1.0, 2.0, 3.0, 4.0])
    run = run_with(np.zeros((5, 5)), np.array([7.0, 10.0, 11.0, 12.0, 30.0]), seconds)
    best = {"none": (0.0, [run]), "EWC": (1.0, [run])}
    (line,) = report.growth_lines(best)
    assert line == "EWC, from task 2 to task 5: memory x3.00, training x2.33, consolidation x2.33"


def test_every_task_has_its_order_of_pixels(permuted):
    first, second = (permuted.examples(task) for task in (0, 1))
    assert first.x.tolist() == [[2, 0, 1], [5, 3, 4], [8, 6, 7], [11, 9, 10]]
    assert second.x.tolist() == [[1, 2, 0], [4, 5, 3], [7, 8, 6], [10, 11, 9]]
    batches = second.in_order(3)
    assert [len(y) for _, y in batches] == [3, 1]
    assert torch.cat([x for x, _ in batches]).equal(second.x)


def test_an_epoch_has_each_example_of_each_task_once(permuted):
    epoch = list(permuted.mixed(range(2)).shuffled(3, torch.Generator().manual_seed(0)))
    tasks, x, y = (torch.cat(parts) for parts in zip(*epoch, strict=True))
    seen = sorted(zip(tasks.tolist(), y.tolist(), x.tolist(), strict=True))
    both = [permuted.examples(t) for t in (0, 1)]
    assert seen == [(t, int(y), x.tolist()) for t in (0, 1) for x, y in zip(both[t].x, both[t].y, strict=True)]
    ((task, x, y),) = both[1].shuffled(4, torch.Generator().manual_seed(0))
    assert task == 1
    assert x.equal(both[1].x[y])
    assert sorted(y.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("heads", [OWN, SHARED])
def test_tasks_of_a_split_problem_tell_two_classes_apart(digits, heads):
    problem = problem_of(PROBLEMS["split-digits"], digits, heads, 5, 30, seed=0)
    train_x, train_y, test_x, test_y = digits
    for t in range(5):
        for tasks, x, y, n in ((problem.train, train_x, train_y, 30), (problem.test, test_x, test_y, None)):
            examples = tasks.examples(t)
            chosen = (y == 2 * t) | (y == 2 * t + 1)
            assert examples.x.equal(x[chosen][:n])
            assert examples.y.equal(y[chosen][:n] - 2 * t)
    network = problem.initial(0)
    assert len(network.heads) == (5 if heads == OWN else 1)
    assert network(train_x[:3]).shape == (3, 2)


def test_a_head_for_each_task():
    torch.manual_seed(0)
    network, x = Network(torch.nn.Tanh(), 4, 3, 2), torch.randn(5, 4)
    outputs = []
    for task in range(3):
        network.task = task
        outputs.append(network(x))
        assert outputs[-1].equal(network.heads[task](x.tanh()))
    network.task = torch.tensor([2, 0, 1, 1, 0])
    assert network(x).equal(torch.stack([outputs[task][i] for i, task in enumerate(network.task)]))
    network.freeze_other_heads(1)
    assert [head.weight.requires_grad for head in network.heads] == [False, True, False]


def test_penalty_belongs_to_the_sum_over_the_tasks_examples(permuted):
    """The gradient of a step, and that which is observed before the penalty comes to it."""
    torch.manual_seed(0)
    body, n_features = problems.perceptron(3)
    model = Network(body, n_features, 1, 4)
    weight, start = body[0].weight, body[0].weight.detach().clone()
    seen, gradients = [], []

    def penalty():
        return 1e6 * (weight - start - 1).pow(2).sum()

    weight.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
    args = SimpleNamespace(optimizer="adam", lr=1e-3, epochs=2, batch_size=2)
    memory = SimpleNamespace(penalty=penalty)
    method = Method(None, None, None, observe=lambda memory: seen.append(weight.grad.clone()))
    sequence.learn(model, permuted.examples(0), args, 0, memory=memory, method=method)
    assert len(seen) == 4
    assert seen[0].abs().max() < 100
    torch.testing.assert_close(gradients[1], torch.full_like(start, -2e6 / 4), rtol=1e-4, atol=0)


def arguments(n_tasks=3):
    return SimpleNamespace(
        tasks=n_tasks,
        optimizer="adam",
        lr=1e-2,
        epochs=2,
        batch_size=10,
        fisher_batch_size=15,
        sampling="exact",
        prior_precision=1.0,
    )


class KilledError(Exception):
    pass


def dying_in(task):
    """Count the tasks that are done, and die before the files of one are written."""
    done = []

    def advance(n):
        done.append(n)
        if sum(done) == task:
            raise KilledError

    return advance


@pytest.mark.parametrize(
    "name",
    [
        "none",
        "EWC",
        "Synaptic Intelligence",
        "K-FAC, kfoc rank 2",
        "TKFAC, factors",
        "K-FAC, kfoc by evidence",
        "joint",
    ],
)
def test_a_killed_sequence_goes_on_with_the_same_numbers(tmp_path, digits, name):
    problem = problem_of(PROBLEMS["split-digits"], digits, OWN, 3, 40, seed=0)

    def run(folder, advance):
        folder.mkdir(exist_ok=True)
        run_files = files.RunFiles.of(folder, name, 10.0, 0)
        return sequence.run_sequence(problem, name, 10.0, 0, arguments(), run_files, advance)

    whole = run(tmp_path / "whole", lambda n: None)
    for dies_in in (2, 3):
        with pytest.raises(KilledError):
            run(tmp_path / "killed", dying_in(dies_in))
        assert len(list((tmp_path / "killed").iterdir())) == (
            2 if METHODS[name] else 1
        )  # one memory, whatever the task
    done = []
    resumed = run(tmp_path / "killed", lambda n: done.append(n))
    assert done == [2, 1]
    np.testing.assert_array_equal(resumed.accuracies, whole.accuracies)
    np.testing.assert_array_equal(resumed.n_bytes, whole.n_bytes)
    (left,) = (tmp_path / "killed").iterdir()
    assert [left.name] == [path.name for path in (tmp_path / "whole").iterdir()]
    done = []
    again = run(tmp_path / "killed", lambda n: done.append(n))
    assert done == [3]
    for field, tensor in again.to_tensors().items():
        torch.testing.assert_close(tensor, resumed.to_tensors()[field], rtol=0, atol=0, equal_nan=True)


def test_a_sequence_that_is_killed_between_its_two_files_goes_on(tmp_path, digits, monkeypatch):
    problem = problem_of(PROBLEMS["permuted-digits"], digits, SHARED, 2, 40, seed=0)
    whole, killed = (files.RunFiles.of(tmp_path, "K-FAC, kfoc", 1.0, seed) for seed in (0, 1))

    def run(run_files):
        return sequence.run_sequence(problem, "K-FAC, kfoc", 1.0, 0, arguments(2), run_files, lambda n: None)

    expected = run(whole)
    calls = []

    def save(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KilledError
        files_save(*args)

    files_save = files.save_tensors
    monkeypatch.setattr(files, "save_tensors", save)
    with pytest.raises(KilledError):
        run(killed)
    np.testing.assert_array_equal(run(killed).accuracies, expected.accuracies)


def test_program(tmp_path, capsys):
    methods = ["none", "EWC", "Synaptic Intelligence", "K-FOC, kfoc", "joint"]
    options = [*SMALL, "--tasks", "3", "--strengths", "1", "5", "--out", str(tmp_path), "--methods", *methods]
    main(options)

    table = lines(tmp_path / "continual.csv")
    assert [line["method"] for line in table] == methods
    assert list(table[0]) == ["method", *(column.key for column in report.COLUMNS)]
    rows = lines(tmp_path / "tasks.csv")
    assert list(rows[0]) == ["method", "strength", "seed", "tasks", *report.SERIES]
    assert len(rows) == 3 * (1 + 3 * 2 + 1)
    assert len(lines(tmp_path / "accuracies.csv")) == 6 * (1 + 3 * 2 + 1)

    sizes = {}
    for row in rows:
        sizes.setdefault(row["method"], []).append(int(row["bytes"]))
    assert sizes["none"] == [0, 0, 0]
    assert sizes["joint"] == [40 * (64 * 4 + 8) * t for t in (1, 2, 3)]
    assert len(set(sizes["K-FOC, kfoc"])) == len(set(sizes["Synaptic Intelligence"])) == 1
    assert sizes["EWC"][0] < sizes["EWC"][1] < sizes["EWC"][2]
    first = {row["accuracy"] for row in rows if row["tasks"] == "1" and row["method"] in ("EWC", "K-FOC, kfoc")}
    assert len(first) == 1  # before the second task there is the prior only

    out, markdown = capsys.readouterr().out, (tmp_path / "continual.md").read_text(encoding="utf-8")
    for text in (out, markdown):
        assert "K-FOC, kfoc, average accuracy by strength: 1: " in text
        assert "consolidation seconds, by number of tasks" in text
        assert "K-FOC, kfoc, from task 2 to task 3: memory x1.00" in text
    assert (tmp_path / "continual.png").exists()


def test_a_grid_is_extended_under_the_same_settings_only(tmp_path, monkeypatch, capsys):
    """What is there is read back, and only the rest is run."""
    options = [*SMALL, "--tasks", "2", "--methods", "none", "EWC", "--out", str(tmp_path)]
    main([*options, "--strengths", "5"])
    before = lines(tmp_path / "tasks.csv")
    learned, learn = [], sequence.learn
    monkeypatch.setattr(sequence, "learn", lambda *args, **kwargs: learned.append(args) or learn(*args, **kwargs))
    main([*options, "--strengths", "5", "7", "--seeds", "0", "1"])
    assert len(learned) == 2 * (1 + 3 + 1 - 1)
    after = lines(tmp_path / "tasks.csv")
    assert len(after) == 2 * 2 * 3
    assert all(row in after for row in before)
    assert "seeds 0, 1: mean ± standard error" in capsys.readouterr().out

    with pytest.raises(SystemExit):
        main([*options, "--lr", "1e-2", "--prior-precision", "2"])
    error = capsys.readouterr().err
    assert "has runs with other settings: prior_precision was 1.0 and is 2.0; lr was 0.001 and is 0.01." in error
    main([*options, "--lr", "1e-2", "--strengths", "5", "--fresh"])
    assert len(lines(tmp_path / "tasks.csv")) == 2 * 2
    assert len(list((tmp_path / files.RUNS).iterdir())) == 2


@pytest.mark.parametrize("heads", [OWN, SHARED])
def test_split_cifar(tmp_path, heads):
    (tmp_path / "cifar10").mkdir()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        records = np.random.default_rng(0).integers(0, 256, (30, BYTES), dtype=np.uint8)
        records[:, 0] = np.arange(30) % 10
        records.tofile(tmp_path / "cifar10" / name)
    options = ["--problem", "split-cifar10", "--heads", heads, "--tasks", "2", "--strengths", "1", *SMALL]
    main([*options, "--methods", "K-FAC, kfoc", "joint", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")])
    accuracies = [float(row["accuracy"]) for row in lines(tmp_path / "out" / "tasks.csv")]
    assert len(accuracies) == 4 and all(0 <= value <= 1 for value in accuracies)


def test_a_diverging_run_ends_without_an_error(tmp_path):
    options = [*SMALL, "--tasks", "2", "--lr", "1e30", "--strengths", "1", "--out", str(tmp_path)]
    for _ in range(2):  # the second time it is read back
        main([*options, "--methods", "EWC", "Synaptic Intelligence"])
        assert [line["accuracy"] for line in lines(tmp_path / "tasks.csv")] == ["nan"] * 4


def test_there_are_only_so_many_classes(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--problem", "split-digits", "--tasks", "6", "--out", str(tmp_path)])
    assert "--tasks 6: split-digits has 1 to 5 tasks" in capsys.readouterr().err


def test_natural_gradients_train_with_the_penalty(tmp_path, capsys):
    options = [*SMALL, "--tasks", "2", "--optimizer", "natural-gradient", "--strengths", "1", "--out", str(tmp_path)]
    main([*options, "--methods", "EWC", "K-FAC, kfoc by evidence", "joint"])
    assert "kfoc by evidence, average" not in capsys.readouterr().out
    accuracies = [float(row["accuracy"]) for row in lines(tmp_path / "tasks.csv")]
    assert len(accuracies) == 6 and all(0 <= value <= 1 for value in accuracies)
    with pytest.raises(SystemExit):
        main([*options, "--methods", "Synaptic Intelligence"])
    assert "use Adam" in capsys.readouterr().err


def test_methods_of_the_default_are_there():
    assert set(BY_DEFAULT) <= set(METHODS)
    assert {"K-FAC, kfoc rank 4", "K-FOC, kfoc rank 2", "Synaptic Intelligence"} <= set(METHODS)
