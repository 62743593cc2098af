"""Inverses that are computed beside the training."""

import copy
import io
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.optim.background import Background
from kronlaplace.optim.preconditioner import InverseInProgress, Renewal
from kronlaplace.optim.structure import BlockDiagonal
from tests.support.assertions import assert_close


class Device:
    """An inverse on an accelerator, which becomes ready when the test says so."""

    def __init__(self, name, error=None):
        self.name, self.error, self.done, self.waited = name, error, False, False

    def begin(self):
        return InverseInProgress(self.settle, lambda: self.done)

    def settle(self):
        self.waited = not self.done
        if self.error is not None:
            raise self.error
        return self.name


def test_only_the_first_inverse_is_waited_for():
    renewal = Renewal(None)
    first, second = Device("first"), Device("second")
    renewal.begin(first.begin)
    assert renewal.inverse == "first" and first.waited and not renewal.busy
    renewal.begin(second.begin)
    renewal.swap()
    assert renewal.inverse == "first" and renewal.busy
    second.done = True
    renewal.swap()
    assert renewal.inverse == "second" and not second.waited and not renewal.busy


@pytest.mark.parametrize("in_background", [False, True])
def test_a_checkpoint_waits_for_the_next_inverse(in_background):
    renewal = Renewal(Background() if in_background else None)
    renewal.begin(Device("first").begin)
    second = Device("second")
    renewal.begin(second.begin)
    renewal.wait()
    assert renewal.inverse == "second" and second.waited and not renewal.busy
    renewal.close()


@pytest.mark.parametrize("in_background", [False, True])
def test_what_is_restored_is_not_replaced_by_what_was_computed_before(in_background):
    renewal = Renewal(Background() if in_background else None)
    renewal.begin(Device("first").begin)
    second = Device("second", ValueError("never seen"))
    renewal.begin(second.begin)
    renewal.restore("from a checkpoint")
    second.done = True
    renewal.swap()
    assert renewal.inverse == "from a checkpoint" and not renewal.busy
    renewal.close()


@pytest.mark.parametrize("when", ["begin", "settle"])
@pytest.mark.parametrize("in_background", [False, True])
def test_after_an_error_the_old_inverse_stays(in_background, when):
    renewal = Renewal(Background() if in_background else None)
    renewal.begin(Device("first").begin)
    second = Device("second", ValueError("layer '2'"))
    second.done = True

    def begin():
        if when == "begin":
            raise ValueError("layer '2'")
        return second.begin()

    def settle():
        renewal.begin(begin)
        renewal.wait()

    with pytest.raises(ValueError, match="layer '2'"):
        settle()
    assert renewal.inverse == "first" and not renewal.busy
    third = Device("third")
    renewal.begin(third.begin)
    renewal.wait()
    assert renewal.inverse == "third"
    renewal.close()


def test_in_a_thread_the_inverse_is_also_settled():
    renewal, threads = Renewal(Background()), []

    def begin():
        return InverseInProgress(lambda: threads.append(threading.current_thread()) or len(threads))

    renewal.begin(begin)
    renewal.begin(begin)
    renewal.wait()
    assert threads[0] is threading.main_thread() and threads[1] is not threading.main_thread()
    assert renewal.inverse == 2
    renewal.close()


class Held(BlockDiagonal):
    """Inverses that wait for the test, except the first."""

    def __init__(self):
        self.go, self.count = threading.Event(), 0

    def inversion(self, accumulation, blocks, damping, added):
        self.count += 1
        compute, number = super().inversion(accumulation, blocks, damping, added), self.count

        def held():
            assert number == 1 or self.go.wait(10)
            return compute()

        return held


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(30, 3).double()
    return model, x, torch.stack([x.sum(1).sin(), x[:, 0] * x[:, 1]], 1)


def optimizer_of(model, **options):
    defaults = {"lr": 0.5, "damping": kl.damping.FactoredTikhonov(0.01), "kl_clip": None, "momentum": 0.5}
    every = {"curvature_every": 1, "invert_every": 1, "invert_async": True}
    return kl.NaturalGradient(model, "regression", **{**defaults, **every, **options})


def step(optimizer, model, x, y):
    optimizer.zero_grad()
    outputs = model(x)
    optimizer.update_curvature(outputs)
    loss = 0.5 * (outputs - y).square().sum() / len(x)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("damping", [kl.damping.FactoredTikhonov(0.1), kl.damping.Tikhonov(0.1), None], ids=repr)
def test_training_converges(damping):
    model, x, y = problem()
    settings = {"lr": 1.0, "momentum": None} if damping is None else {"lr": 0.2}
    with optimizer_of(model, damping=damping, model_fraction=1.0, **settings) as optimizer:
        losses = [step(optimizer, model, x, y) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]


def test_training_converges_with_blocks_between_layers():
    model, x, y = problem()
    damping = kl.damping.FactoredTikhonov(0.1)
    with optimizer_of(model, structure="block-tridiagonal", damping=damping, lr=0.2) as optimizer:
        losses = [step(optimizer, model, x, y) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]


def test_training_goes_on_while_an_inverse_is_computed():
    """Until it is ready, the steps are those with the old one, and no further inverse begins."""
    model, x, y = problem()
    other, held = copy.deepcopy(model), Held()
    with (
        optimizer_of(model, structure=held) as optimizer,
        optimizer_of(other, invert_async=False, invert_every=100) as plain,
    ):
        for _ in range(4):
            step(optimizer, model, x, y)
            step(plain, other, x, y)
            assert torch.equal(model[0].weight, other[0].weight)
        assert held.count == 2
        held.go.set()
        optimizer._renewal.wait()
        step(optimizer, model, x, y)
        step(plain, other, x, y)
        assert held.count == 3
        assert not torch.equal(model[0].weight, other[0].weight)


def test_a_checkpoint_while_an_inverse_is_computed_has_it():
    model, x, y = problem()
    held = Held()
    with optimizer_of(model, structure=held, invert_every=2) as optimizer:
        for _ in range(3):
            step(optimizer, model, x, y)
        assert optimizer._renewal.busy
        threading.Timer(0.02, held.go.set).start()
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        assert not optimizer._renewal.busy
        step(optimizer, model, x, y)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, x, y = problem()
    with optimizer_of(other, invert_every=2) as optimizer:
        optimizer.load_state_dict(saved["optimizer"])
        other.load_state_dict(saved["model"])
        step(optimizer, other, x, y)
    assert_close(other[0].weight.detach(), model[0].weight.detach(), 0)


def test_a_checkpoint_is_loaded_while_an_inverse_is_computed():
    """That inverse belongs to weights that are gone."""
    model, x, y = problem()
    held = Held()
    with optimizer_of(model, structure=held, invert_every=2) as optimizer:
        for _ in range(2):
            step(optimizer, model, x, y)
        state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        step(optimizer, model, x, y)
        assert optimizer._renewal.busy
        held.go.set()
        optimizer.load_state_dict(state)
        model.load_state_dict(weights)
        inverse = optimizer._renewal.inverse.to_tensors()
        optimizer._renewal.wait()
        for name, part in optimizer._renewal.inverse.to_tensors().items():
            assert torch.equal(part["gradient_inverse"], inverse[name]["gradient_inverse"])
            assert torch.equal(part["gradient_inverse"], state["curvature"]["inverse"][name]["gradient_inverse"])


def test_an_error_in_the_background_names_the_layer():
    """The step in which it surfaces is not made, and training can go on with the old inverse."""
    model, x, y = problem()
    with optimizer_of(model) as optimizer:
        step(optimizer, model, x, y)
        kept = optimizer._curvature.accumulation.state("2")["gradient"].clone()
        optimizer._curvature.accumulation.state("2")["gradient"].fill_(torch.nan)
        step(optimizer, model, x, y)
        optimizer._curvature.accumulation.state("2")["gradient"].copy_(kept)
        optimizer._renewal._background._runner._jobs.put(None)  # the thread ends after its job
        optimizer._renewal._background._runner._thread.join()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="layer '2'"):
            step(optimizer, model, x, y)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_close_ends_the_thread():
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "kronlaplace-background"]

    model, x, y = problem()
    before = len(threads())
    optimizer = optimizer_of(model)
    for _ in range(3):
        step(optimizer, model, x, y)
    assert len(threads()) == before + 1
    optimizer.close()
    assert len(threads()) == before


@pytest.mark.grid
def test_the_interpreter_ends_while_an_inverse_is_computed():
    program = """
import torch, kronlaplace as kl
from torch import nn
model = nn.Linear(600, 600)
optimizer = kl.NaturalGradient(model, "regression", damping=kl.damping.Tikhonov(0.1), kl_clip=None,
                               curvature_every=1, invert_every=1, invert_async=True)
for _ in range(2):
    outputs = model(torch.randn(10, 600))
    optimizer.update_curvature(outputs)
    (outputs.square().sum() / 20).backward()
    optimizer.step()
print(optimizer._renewal.busy)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
