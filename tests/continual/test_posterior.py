"""The posterior of a memory, against dense algebra in float64."""

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.continual import posterior as module
from kronlaplace.damping import kronecker_sum
from tests.support import continual
from tests.support.continual import close, data, learned, move, network

DELTA = 0.6


def memory_of(model, estimator="kfac", **options):
    return kl.ContinualLaplace(model, "classification", estimator, **{"prior_precision": DELTA, **options})


def precision(posterior):
    """The inverse of the dense posterior covariance."""
    dense = []
    for name, inverse in posterior.covariance().items():
        q, p = posterior.fisher[name].shape
        unit = torch.eye(q * p).double().view(-1, q, p)
        dense.append(inverse.solve(unit).flatten(1))
    return torch.linalg.inv(torch.block_diag(*dense))


def large(monkeypatch):
    """Let sums of blocks be as inexact as they are for layers of more than 2,048 weights."""
    monkeypatch.setattr(module, "LARGEST_DENSE", 0)
    monkeypatch.setattr(kronecker_sum, "LARGEST_DENSE", 0)


def with_prior(curvature):
    return curvature + DELTA * torch.eye(len(curvature)).double()


@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "ekfac", "diagonal", "exact"])
@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_small_layers_are_exact(estimator, tasks):
    memory = memory_of(network("images"), estimator, strength=7.0)
    fishers, _ = learned(memory, "images", tasks=tasks, estimator=estimator)
    close(precision(memory.posterior()), with_prior(sum(fishers)))


@pytest.mark.parametrize("mode", ["latest", "per-task"])
def test_after_one_task_it_is_the_fitted_one(mode):
    model = network()
    task = data()
    posterior = memory_of(model, mode=mode).consolidate(task).posterior()
    fitted = kl.KronLaplace(model, "classification", prior_precision=DELTA).fit(task)
    x = data()[0][0]
    close(posterior.log_marginal_likelihood(), fitted.log_marginal_likelihood())
    close(posterior.predict(x), fitted.predict(x))


@pytest.mark.parametrize(("merge", "function"), [("kfoc", None), ("factors", continual.marginal_product)])
def test_merged_products_are_exact(monkeypatch, merge, function):
    large(monkeypatch)
    memory = memory_of(network(), merge=merge)
    fishers, _ = learned(memory, tasks=2)
    function = function or (lambda *block: continual.best_rank(*block, rank=1))
    expected = continual.blockwise(memory.model, sum(fishers), function)
    close(precision(memory.posterior()), with_prior(expected))


def test_two_products_are_a_fisher_and_a_prior(monkeypatch):
    large(monkeypatch)
    memory = memory_of(network())
    fishers, _ = learned(memory, tasks=2)
    posterior = memory.posterior()
    assert isinstance(posterior.prior, kl.KroneckerPrior)
    total = posterior.prior.fisher.to_dense() + 24 * posterior.fisher.to_dense()
    close(total, sum(fishers))
    assert all(float(posterior.prior.block_and_identity(name)[1]) == DELTA for name in posterior.layers)
    with pytest.warns(UserWarning, match="multiple of the identity"):  # KronLaplace says what it does with them
        posterior.covariance()


def test_layers_with_one_product_are_exact_beside_those_with_two(monkeypatch):
    large(monkeypatch)
    model = network("heads")
    memory = memory_of(model)
    expected = {}
    for model.task in range(2):
        task = data("heads")
        memory.consolidate(task)
        name = f"heads.{model.task}"
        fisher = kl.estimate_fisher(model, task, "classification", layers=name)
        expected[name] = with_prior(12 * fisher[name].to_dense())
    posterior = memory.posterior()
    assert posterior.layers == ["body", "heads.0", "heads.1"]
    with pytest.warns(UserWarning, match=r"Kronecker products of 'body' \(25 weights\) in"):
        covariance = posterior.covariance()
    for name, dense in expected.items():
        inverse = covariance[name].solve(torch.eye(12).double().view(12, 2, 6)).flatten(1)
        close(torch.linalg.inv(inverse), dense)


@pytest.mark.parametrize("options", [{}, {"merge": "kfoc", "rank": 3}])
def test_three_large_products_become_the_nearest_with_a_warning(monkeypatch, options):
    large(monkeypatch)
    memory = memory_of(network(), **options)
    fishers, _ = learned(memory, tasks=3)
    with pytest.warns(UserWarning, match="the posterior has the nearest single one") as record:
        posterior = memory.posterior()
    assert record[0].filename == __file__
    expected = continual.blockwise(memory.model, sum(fishers), lambda *b: continual.best_rank(*b, rank=1))
    close(precision(posterior), with_prior(expected))


def test_large_eigenbases_become_one_with_a_warning(monkeypatch):
    large(monkeypatch)
    memory = memory_of(network(), "ekfac")
    fishers, _ = learned(memory, tasks=2, estimator="ekfac")
    with pytest.warns(UserWarning, match="nearest single one"):
        posterior = memory.posterior()
    expected = continual.blockwise(memory.model, sum(fishers), continual.in_common_basis)
    close(precision(posterior), with_prior(expected))


def test_a_kronecker_prior_is_kept(monkeypatch):
    model = network()
    pretrained = kl.KronLaplace(model, "classification", prior_precision=0.4).fit(data())
    base = 12 * pretrained.fisher.to_dense() + 0.4 * torch.eye(43).double()
    memory = kl.ContinualLaplace(model, "classification", prior_precision=pretrained.as_prior())
    fishers, _ = learned(memory, tasks=2)
    close(precision(memory.posterior()), base + sum(fishers))


def test_blocks_of_different_kinds(monkeypatch):
    memory = memory_of(network())
    learned(memory, tasks=1)
    for estimator in ("ekfac", "diagonal"):
        memory.consolidate(fisher=kl.estimate_fisher(memory.model, data(), "classification", estimator))
    memory.posterior()
    large(monkeypatch)
    with pytest.raises(NotImplementedError, match=r"kinds \['diagonal', 'eigen', 'kronecker'\] with 25 weights"):
        memory.posterior()


def test_heads_without_a_task_and_frozen_layers_are_left_out():
    model = network("heads")
    memory = memory_of(model).consolidate(data("heads"))
    assert memory.posterior().layers == ["body", "heads.0"]
    model.heads[0].requires_grad_(False)
    assert memory.posterior().layers == ["body"]


def test_it_needs_a_task_and_its_weights():
    memory = memory_of(network())
    with pytest.raises(RuntimeError, match=r"no task yet: call consolidate\(loader\)"):
        memory.posterior()
    learned(memory, tasks=1)
    move(memory.model)
    with pytest.raises(RuntimeError, match=r"'0\.weight' changed after task 'task 1'"):
        memory.posterior()


def test_it_is_the_prior_of_a_next_posterior():
    """What a memory does by itself, in the posterior's own terms."""
    memory = memory_of(network())
    learned(memory, tasks=2)
    prior = memory.posterior().as_prior()
    move(memory.model)
    weights = {layer.name: layer.matrix() for layer in kl.find_layers(memory.model)}
    prior = prior.over(kl.find_layers(memory.model))
    close(0.5 * prior.penalty(weights), memory.penalty().detach())


def test_no_module_of_the_memory_needs_the_posterior():
    """Consumers of the core do not import one another, except where a memory is asked for its posterior."""
    import ast
    from pathlib import Path

    for path in (Path(kl.__file__).parent / "continual").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("kronlaplace.laplace"), path


def test_regression_is_that_of_all_data():
    model = nn.Sequential(nn.Linear(3, 1)).double().eval()
    memory = kl.ContinualLaplace(model, kl.Gaussian(0.5), prior_precision=DELTA)
    xs = [torch.randn(8, 3).double() for _ in range(2)]
    for x in xs:
        memory.consolidate([(x, torch.randn(8, 1).double())])
    a = torch.cat([torch.cat([x, torch.ones(8, 1).double()], 1) for x in xs])
    expected = a.mT @ a / 0.25 + DELTA * torch.eye(4).double()
    close(precision(memory.posterior()), expected)
