"""The experiments with optimizers run, at sizes at which they measure nothing."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from experiments import autoencoder, cifar, damping_comparison, default_settings, optimizers, step_cost
from experiments.cifar_files import BYTES
from experiments.second_order_peers import PEERS, grid
from experiments.training import Limits, Log, Optimizer, Problem, Training, train, train_in_turn, tuned
from tests.support.tables import lines

pytestmark = pytest.mark.usefixtures("same_threads")

SMALL = ["--threads", "1", "--device", "cpu"]


@pytest.fixture
def regression():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    return Problem(
        "line",
        lambda: nn.Sequential(nn.Linear(3, 1)),
        nn.functional.mse_loss,
        "regression",
        x,
        x.sum(1, keepdim=True),
        8,
    )


def descent(rate):
    return optimizers.plain(lambda parameters: torch.optim.SGD(parameters, lr=rate))


def test_smoothed_losses_are_weighted_means():
    losses = [3.0, 5.0, 1.0]
    weights = 0.7 ** np.arange(2, -1, -1.0)
    assert Log(losses).smoothed[-1] == pytest.approx(np.average(losses, weights=weights), rel=1e-12)


def test_target_and_time_of_a_log():
    log = Log([8.0, 4.0, 2.0], [1.0, 2.0, 3.0], {1: 8.0, 2: 4.0, 3: 2.0})
    assert log.reached(4.0) == (2, 2.0)
    assert log.reached(1.0) == (math.inf, math.inf)
    assert log.after(2.5) == 4.0
    assert math.isnan(Log([8.0], [1.0], error="diverged").after(2.0))


def test_batches_are_an_epoch_without_the_last_short_one(regression):
    batches = regression.batches(seed=0)
    epoch = torch.cat([next(batches)[0] for _ in range(2)])
    assert len(epoch.unique(dim=0)) == 16
    assert all(len(x) == 8 for x, _ in (next(batches) for _ in range(5)))


def test_all_train_from_the_same_weights_on_the_same_batches(regression):
    trainings = {
        key: Training(regression, Optimizer(descent(rate)), {}, Limits(updates=4))
        for key, rate in (("a", 0.0), ("b", 0.1))
    }
    logs = train_in_turn(trainings)
    alone = train(regression, Optimizer(descent(0.1)), {}, Limits(updates=4))
    assert logs["a"].losses[0] == logs["b"].losses[0]
    assert logs["b"].losses == alone.losses
    assert logs["a"].losses[2:] != logs["b"].losses[2:]


def test_divergence_ends_a_training_and_is_no_result(regression):
    log = train(regression, Optimizer(descent(1e6)), {}, Limits(updates=50))
    assert len(log.losses) < 50
    assert log.error.startswith("update 2: diverged") or "diverged" in log.error
    assert math.isnan(log.after(math.inf))


def test_an_optimizers_error_ends_its_training_only(regression):
    def prepare(model, problem):
        def update(x, y):
            raise RuntimeError("no")

        return update

    logs = train_in_turn(
        {
            "bad": Training(regression, Optimizer(prepare), {}, Limits(updates=2)),
            "good": Training(regression, Optimizer(descent(0.1)), {}, Limits(updates=2)),
        }
    )
    assert logs["bad"].error == "update 1: RuntimeError: no"
    assert len(logs["good"].losses) == 2


def test_grid_chooses_the_fewest_updates(regression):
    make = optimizers.plain(torch.optim.SGD)
    settings, said = tuned(
        "SGD", regression, Optimizer(make, grid(lr=(1e-4, 0.3, 1e6))), Limits(updates=30, target=0.2)
    )
    assert settings == {"lr": 0.3}
    assert len(said) == 3
    assert "target at update" in said[1] and "diverged" in said[2]


def test_averaged_weights_are_those_evaluated(regression):
    def score(model):
        return float(model[0].weight.detach().sum())

    problem = Problem("line", regression.network, regression.loss, "regression", regression.x, regression.y, 8, score)
    prepare = optimizers.averaged(descent(0.3))
    plain, averaged = (
        train(problem, Optimizer(f), {}, Limits(updates=3), score_every=1) for f in (descent(0.3), prepare)
    )
    start = score(problem.initial(0))
    assert plain.losses == averaged.losses
    assert abs(averaged.scores[3] - start) < abs(plain.scores[3] - start) / 10


def test_autoencoder(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("KRONLAPLACE_DATA", raising=False)
    monkeypatch.setattr(autoencoder, "WIDTHS", (6, 3, 6))
    options = ["--digits", "40", "--batch-size", "20", "--updates", "3", "--grid-updates", "2", "--out", str(tmp_path)]
    autoencoder.main([*options, "--optimizers", "Adam, 1e-3", "SGD with momentum", *SMALL])
    rows = {line["method"]: line for line in lines(tmp_path / "comparison.csv")}
    assert [name.split(" (lr=")[0] for name in rows] == ["Adam, 1e-3", "SGD with momentum"]
    log = lines(tmp_path / "Adam, 1e-3.csv")
    assert [line["update"] for line in log] == ["1", "2", "3"]
    assert float(log[0]["loss"]) == pytest.approx(64 * math.log(2), rel=0.05)
    assert "8x8 digits" in capsys.readouterr().out
    assert "SGD with momentum: lr=0.001" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert (tmp_path / "comparison.png").exists()


def test_sparse_weights():
    layer = nn.Linear(40, 7)
    autoencoder.sparse_(layer)
    assert (layer.weight != 0).sum(1).tolist() == [15] * 7
    assert layer.bias.count_nonzero() == 0


def test_cifar(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (20, BYTES), dtype=np.uint8)
    records[:, 0] %= 10
    (tmp_path / "cifar10").mkdir()
    records.tofile(tmp_path / "cifar10" / "data_batch_1.bin")
    x, y = cifar.images(tmp_path, 20)
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert y.tolist() == records[:, 0].tolist()
    options = [
        "--images",
        "20",
        "--batch-size",
        "10",
        "--updates",
        "2",
        "--score-every",
        "2",
        "--network",
        "batch_norm",
    ]
    cifar.main([*options, "--optimizers", "Adam, 1e-3", "--data-dir", str(tmp_path), "--out", str(tmp_path), *SMALL])
    assert [line["score"] != "" for line in lines(tmp_path / "Adam, 1e-3.csv")] == [False, True]


def test_resnet20_is_the_published_one():
    model = cifar.resnet20()
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("network", default_settings.NETWORKS)
def test_default_settings(tmp_path, network):
    options = ["--networks", network, "--updates", "2", "--batch-size", "8", "--out", str(tmp_path)]
    default_settings.main([*options, "--optimizers", "Adam", "NaturalGradient", "AdaptiveKFAC", *SMALL])
    for name in ("Adam", "NaturalGradient", "AdaptiveKFAC"):
        assert len(lines(tmp_path / network / f"{name}.csv")) == 2


def test_damping_comparison(tmp_path, monkeypatch):
    monkeypatch.delenv("KRONLAPLACE_DATA", raising=False)
    monkeypatch.setattr(autoencoder, "WIDTHS", (6, 3, 6))
    sizes = {"digits": 20, "batch-size": 10, "updates": 3, "grid-updates": 1, "target": 0, "rates": 0.03, "every": 2}
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    chosen = ["tkfac, Eq. 5.15", "kfac, Eq. 5.16, 5.17", "kfoc, factored", "ekfac, Tikhonov", "diagonal, Tikhonov"]
    damping_comparison.main([*options, "--optimizers", *chosen, "--out", str(tmp_path), *SMALL])
    names = [line["method"].split(" (")[0] for line in lines(tmp_path / "comparison.csv")]
    assert names == chosen
    assert len(damping_comparison.optimizers(2)) == 1 + 3 * 3 + 2
    assert all(len(lines(tmp_path / f"{name}.csv")) == 3 for name in names)


@pytest.mark.parametrize("is_profile", [False, True])
def test_step_cost(tmp_path, monkeypatch, is_profile):
    monkeypatch.setattr(autoencoder, "WIDTHS", (6, 3, 6))
    sizes = ["--problems", "autoencoder", "--batch-size", "4", "--steps", "2", "--warm-up", "1", "--out", str(tmp_path)]
    step_cost.main([*sizes, "--optimizers", "default", *SMALL, *(["--profile"] if is_profile else [])])
    rows = {line["method"]: line for line in lines(tmp_path / f"autoencoder{'_waits' if is_profile else ''}.csv")}
    assert list(rows) == [step_cost.PLAIN, "default"]
    if not is_profile:
        assert float(rows["default"]["held_mib"]) > 0


def test_held_bytes_passes_over_what_has_no_storage():
    kept = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(torch.ones(2))
    before = step_cost.held_bytes(torch.device("cpu"))
    more = torch.ones(1000)
    assert step_cost.held_bytes(torch.device("cpu")) >= before + more.nbytes and kept


OURS = {name: o for name, o in (optimizers.OPTIMIZERS | optimizers.CHAIN_OPTIMIZERS).items() if name not in PEERS}


@pytest.mark.parametrize("optimizer", OURS.values(), ids=OURS)
def test_every_optimizer_lowers_the_loss(regression, optimizer):
    log = train(regression, optimizer, optimizer.grid[-1], Limits(updates=6))
    assert not log.error
    assert log.smoothed[-1] < log.losses[0]


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if not peer.missing])
@pytest.mark.filterwarnings("ignore")  # of other libraries
def test_peers_train(regression, name):
    log = train(regression, PEERS[name], PEERS[name].grid[0], Limits(updates=3))
    assert not log.error
    assert len(set(log.losses)) == 3
