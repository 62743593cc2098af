"""The strength by the evidence of a new task, against dense algebra in float64."""

import pytest
import torch
import torch.nn.functional as F

import kronlaplace as kl
from kronlaplace.continual.strength import evidence_of_strength
from tests.support.continual import MultiHead, data, flat, learned, move, network

DELTA = 0.7


def memory_of(estimator="kfac", tasks=2, size=0.3, **options):
    """A memory whose network has moved on toward a new task, and the weights at the end of the last."""
    memory = kl.ContinualLaplace(network(), "classification", estimator, prior_precision=DELTA, **options)
    _, ends = learned(memory, estimator=estimator, tasks=tasks)
    move(memory.model, size)
    return memory, ends[-1]


def dense_evidence(memory, precision, end, x, y, fisher, strength):
    """``log p(D | θ) − λ/2 vᵀΛv − ½ log det(N F + λ Λ) + ½ log det(λ Λ)``."""
    with torch.no_grad():
        fit = -F.cross_entropy(memory.model(x), y, reduction="sum")
        v = flat(memory.model) - end
    prior = strength * precision
    return fit - 0.5 * (v @ prior @ v + torch.logdet(len(x) * fisher + prior) - torch.logdet(prior))


@pytest.mark.parametrize("strength", [0.2, 1.0, 30.0])
@pytest.mark.parametrize("merge", ["sum", "kfoc"])
@pytest.mark.parametrize("estimator", ["kfac", "diagonal", "exact"])
def test_the_evidence_is_the_dense_one(estimator, merge, strength):
    memory, end = memory_of(estimator, merge="sum" if estimator != "kfac" else merge)
    ((x, y),) = data()
    fisher = kl.estimate_fisher(memory.model, [(x, y)], "classification", estimator)
    evidence = evidence_of_strength(memory._seen(), fisher)
    precision = torch.block_diag(
        *(sum(block.to_dense() for block in part.blocks) for part in memory.precision().values())
    )
    precision = precision + DELTA * torch.eye(len(precision)).double()
    expected = dense_evidence(memory, precision, end, x, y, fisher.to_dense(), strength)
    assert float(evidence(torch.tensor(strength).double())) == pytest.approx(float(expected), rel=1e-7)


def test_the_strength_is_where_the_evidence_is_largest():
    memory, end = memory_of(merge="kfoc")
    ((x, y),) = data()
    fisher = kl.estimate_fisher(memory.model, [(x, y)], "classification")
    precision = torch.block_diag(
        *(sum(block.to_dense() for block in part.blocks) for part in memory.precision().values())
    )
    precision = precision + DELTA * torch.eye(len(precision)).double()
    penalty = float(memory.penalty().detach())
    assert memory.tune_strength([(x, y)]) is memory
    assert float(memory.penalty().detach()) == pytest.approx(memory.strength * penalty)

    def value(factor):
        return dense_evidence(memory, precision, end, x, y, fisher.to_dense(), memory.strength * factor)

    assert value(1.0) > value(1.05)
    assert value(1.0) > value(0.95)
    tuned = memory.strength
    memory.strength = 7.0  # does not depend on where it was
    assert memory.tune_strength(fisher=fisher).strength == pytest.approx(tuned, rel=1e-6)


def test_heads_of_their_own_say_nothing_about_the_strength():
    torch.manual_seed(1)
    memory = kl.ContinualLaplace(MultiHead().double().eval(), "classification", prior_precision=DELTA)
    memory.consolidate(data("heads"))
    memory.model.task = 1
    move(memory.model)
    task = data("heads")
    fisher = kl.estimate_fisher(
        memory.model, task, "classification", unsupported="fixed", exclude=["heads.0", "heads.2"]
    )
    assert [block.name for block in evidence_of_strength(memory._seen(), fisher).blocks] == ["body"]
    assert memory.tune_strength(task).strength > 0


def test_errors_leave_the_strength_alone():
    memory = kl.ContinualLaplace(network(), "classification", strength=3.0)
    with pytest.raises(RuntimeError, match="no task yet"):
        memory.tune_strength(data())
    task = data()
    memory.consolidate(task)
    with pytest.raises(ValueError, match="no maximum in the strength"):
        memory.tune_strength(task)  # at the weights of the earlier task
    with pytest.raises(TypeError, match="exactly one of them"):
        memory.tune_strength()
    move(memory.model)
    with pytest.raises(ValueError, match="needs targets"):
        memory.tune_strength([x for x, _ in data()])
    per_task = kl.ContinualLaplace(network(), "classification", mode="per-task", strength=3.0)
    per_task.consolidate(task)
    with pytest.raises(NotImplementedError, match='mode="latest"'):
        per_task.tune_strength(task)
    assert memory.strength == per_task.strength == 3.0


def test_a_sum_of_large_products_is_said_to_be_approximated(monkeypatch):
    monkeypatch.setattr("kronlaplace.continual.posterior.LARGEST_DENSE", 1)
    memory, _ = memory_of(merge="sum")
    ((x, y),) = data()
    with pytest.warns(UserWarning, match="the evidence has the nearest single one"):
        memory.tune_strength([(x, y)])
