"""The penalty and its gradient against dense algebra in float64."""

import pytest
import torch

import kronlaplace as kl
from tests.support import continual
from tests.support.continual import close, flat, learned, move, network, penalty_and_gradient

ESTIMATORS = ["kfac", "tkfac", "kfoc", "ekfac", "diagonal", "exact"]
DELTA = 0.7


def memory_of(model, estimator="kfac", **options):
    return kl.ContinualLaplace(model, "classification", estimator, **{"prior_precision": DELTA, **options})


def check_around_latest(memory, curvature, end, strength=1.0):
    """``λ/2 vᵀ (Λ + δ I) v`` and its gradient ``λ (Λ + δ I) v``."""
    move(memory.model)
    v = (flat(memory.model) - end).detach()
    product = strength * (curvature @ v + DELTA * v)
    value, gradient = penalty_and_gradient(memory)
    close(value, 0.5 * v @ product)
    close(gradient, product)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["mlp", "images"])
def test_sum_is_exact(kind, estimator):
    memory = memory_of(network(kind), estimator, strength=2.5)
    fishers, ends = learned(memory, kind, estimator=estimator)
    check_around_latest(memory, sum(fishers), ends[-1], strength=2.5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_task_around_its_own_weights(estimator):
    memory = memory_of(network(), estimator, mode="per-task", strength=2.5)
    fishers, ends = learned(memory, estimator=estimator)
    move(memory.model)
    weights = flat(memory.model).detach()
    pulls = [2.5 * fisher @ (weights - end) for fisher, end in zip(fishers, ends, strict=True)]
    value, gradient = penalty_and_gradient(memory)
    expected = sum(pull @ (weights - end) for pull, end in zip(pulls, ends, strict=True))
    close(value, 0.5 * (expected + DELTA * weights @ weights))  # the prior around its own mean, without the strength
    close(gradient, sum(pulls) + DELTA * weights)


@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "kfoc"])
@pytest.mark.parametrize("kind", ["mlp", "images"])
def test_kfoc_keeps_the_nearest_product(kind, estimator):
    memory = memory_of(network(kind), estimator, merge="kfoc")
    fishers, ends = learned(memory, kind, estimator=estimator)
    kept = 0
    for fisher in fishers:
        kept = continual.blockwise(memory.model, kept + fisher, lambda *block: continual.best_rank(*block, rank=1))
    check_around_latest(memory, kept, ends[-1])


def test_kfoc_with_a_rank_keeps_so_many_exactly():
    memory = memory_of(network(), merge="kfoc", rank=3)
    fishers, ends = learned(memory)
    check_around_latest(memory, sum(fishers), ends[-1])


@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "kfoc"])
@pytest.mark.parametrize("kind", ["mlp", "images"])
def test_averaged_factors_have_the_traces_of_the_sum(kind, estimator):
    memory = memory_of(network(kind), estimator, merge="factors")
    fishers, ends = learned(memory, kind, estimator=estimator)
    expected = continual.blockwise(memory.model, sum(fishers), continual.marginal_product)
    check_around_latest(memory, expected, ends[-1])


def test_averaged_eigenbases_are_those_of_the_partial_traces():
    memory = memory_of(network("images"), "ekfac", merge="factors")
    fishers, ends = learned(memory, "images", tasks=2, estimator="ekfac")
    expected = continual.blockwise(memory.model, sum(fishers), continual.in_common_basis)
    check_around_latest(memory, expected, ends[-1])


@pytest.mark.parametrize("merge", ["sum", "kfoc", "factors"])
@pytest.mark.parametrize("estimator", ["diagonal", "exact"])
def test_diagonal_and_dense_blocks_add_up_in_constant_memory(estimator, merge):
    memory = memory_of(network(), estimator, merge=merge)
    (first,), _ = learned(memory, tasks=1, estimator=estimator)
    size = memory.n_bytes
    fishers, ends = learned(memory, tasks=3, estimator=estimator)
    assert memory.n_bytes == size
    check_around_latest(memory, first + sum(fishers), ends[-1])


# -- the prior -------------------------------------------------------------------------------------------------


def test_before_the_first_task_it_is_the_priors():
    model = network()
    mean = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    memory = memory_of(model, prior_mean=mean, strength=3.0)
    v = (flat(model) - flat(model, mean)).detach()
    value, gradient = penalty_and_gradient(memory)
    close(value, 0.5 * DELTA * v @ v)
    close(gradient, DELTA * v)


def test_any_prior():
    model = network()
    pretrained = kl.KronLaplace(model, "classification", prior_precision=0.4).fit(continual.data())
    precision = 12 * pretrained.fisher.to_dense() + 0.4 * torch.eye(43).double()
    before = flat(model).detach()
    memory = kl.ContinualLaplace(model, "classification", prior_precision=pretrained.as_prior())
    move(model)
    v = (flat(model) - before).detach()
    close(penalty_and_gradient(memory)[1], precision @ v)
    fishers, ends = learned(memory)
    move(model)
    v = (flat(model) - ends[-1]).detach()
    close(penalty_and_gradient(memory)[1], (sum(fishers) + precision) @ v)


def test_one_precision_per_layer():
    model = network()
    memory = memory_of(model, prior_precision=[0.5, 2.0])
    v = flat(model).detach()
    close(penalty_and_gradient(memory)[1], torch.cat([0.5 * v[:25], 2.0 * v[25:]]))


# -- precision and differentiability ---------------------------------------------------------------------------


def test_second_derivatives():
    memory = memory_of(network())
    fishers, _ = learned(memory)
    move(memory.model)
    names, parameters = zip(*memory.model.named_parameters(), strict=True)
    grads = torch.autograd.grad(memory.penalty(), parameters, create_graph=True)
    direction = [torch.randn_like(p) for p in parameters]
    products = torch.autograd.grad(grads, parameters, direction)
    u = flat(memory.model, dict(zip(names, direction, strict=True)))
    close(flat(memory.model, dict(zip(names, products, strict=True))), sum(fishers) @ u + DELTA * u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    model = network().to(dtype)
    memory = memory_of(model)
    for _ in range(3):
        move(model)
        memory.consolidate([(x.to(dtype), y) for x, y in continual.data()])
    with torch.autocast("cpu", torch.bfloat16):
        end = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.5)
        value = memory.penalty()
    assert value.dtype == torch.float32
    v = flat(model, {name: p.double() - end[name].double() for name, p in model.named_parameters()}).detach()
    state = memory._state.layers
    dense = torch.block_diag(*(sum(t.block.to_dense() for t in layer.terms) for layer in state.values())).double()
    close(value.detach().double(), 0.5 * (v @ dense @ v + DELTA * v @ v), rtol=1e-4)


def test_it_follows_the_model_to_another_dtype():
    memory = memory_of(network())
    learned(memory)
    move(memory.model)
    expected = memory.penalty().detach()
    memory.model.float()
    found = memory.penalty()
    assert found.dtype == torch.float32
    close(found.detach().double(), expected, rtol=1e-5)
