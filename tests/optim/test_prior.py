"""Natural gradients under a penalty that the optimizer knows, against dense algebra in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import kronlaplace as kl
from tests.support import continual
from tests.support.continual import N, close, data, flat, learned, move, network
from tests.support.natural_gradients import copies, exact_fisher

DELTA, GAMMA, STRENGTH = 0.7, 0.05, 2.5


def memory_of(estimator="kfac", tasks=3, **options):
    memory = kl.ContinualLaplace(
        network().train(), "classification", estimator, prior_precision=DELTA, strength=STRENGTH, **options
    )
    memory.model.eval()
    fishers, ends = learned(memory, estimator=estimator, tasks=tasks) if tasks else ([], [])
    move(memory.model)
    return memory, fishers, ends


def plain(memory, estimator, **options):
    """Steps ``−(F̂ + …)⁻¹ ∇h``, with nothing else."""
    settings = {"damping": kl.damping.Tikhonov(GAMMA), "momentum": 0.0, "kl_clip": None, "curvature_fraction": 1.0}
    return kl.NaturalGradient(
        memory.model, "classification", estimator=estimator, sampling="exact", prior=memory, **settings | options
    )


def step(optimizer, memory, x, y, n_examples=None, loss=F.cross_entropy):
    optimizer.zero_grad()
    outputs = memory.model(x)
    optimizer.update_curvature(outputs)
    (loss(outputs, y) + memory.penalty() / (n_examples or len(x))).backward()
    optimizer.step()


def gradient(memory, x, y, n_examples=None):
    """The gradient of the objective, as `flat` has weights."""
    objective = F.cross_entropy(memory.model(x), y) + memory.penalty() / (n_examples or len(x))
    names, parameters = zip(*memory.model.named_parameters(), strict=True)
    return flat(memory.model, dict(zip(names, torch.autograd.grad(objective, parameters), strict=True)))


def expected_step(memory, curvature, g, identity):
    return -torch.linalg.solve(curvature + identity * torch.eye(len(g)).double(), g)


def taken(memory, act):
    before = flat(memory.model).detach()
    act()
    return flat(memory.model).detach() - before


@pytest.mark.parametrize("mode", ["latest", "per-task"])
@pytest.mark.parametrize("estimator", ["diagonal", "exact"])
def test_a_step_solves_with_the_exact_sum(estimator, mode):
    memory, fishers, _ = memory_of(estimator, mode=mode)
    ((x, y),) = data()
    n = 40  # more than the batch has
    fisher = kl.estimate_fisher(memory.model, [(x, y)], "classification", estimator).to_dense()
    identity = GAMMA + DELTA / n * (STRENGTH if mode == "latest" else 1)
    expected = expected_step(memory, fisher + STRENGTH / n * sum(fishers), gradient(memory, x, y, n), identity)
    with plain(memory, estimator) as optimizer:
        close(taken(memory, lambda: step(optimizer, memory, x, y, n)), expected)


@pytest.mark.parametrize("merge", ["sum", "kfoc"])
@pytest.mark.parametrize("estimator", ["kfac", "tkfac"])
def test_a_step_solves_with_the_nearest_product(estimator, merge):
    memory, fishers, _ = memory_of(estimator, merge=merge)
    ((x, y),) = data()
    kept = sum(fishers)
    if merge == "kfoc":
        kept = 0
        for fisher in fishers:
            kept = continual.blockwise(memory.model, kept + fisher, lambda *block: continual.best_rank(*block, rank=1))
    fisher = kl.estimate_fisher(memory.model, [(x, y)], "classification", estimator).to_dense()
    nearest = continual.blockwise(
        memory.model, fisher + STRENGTH / N * kept, lambda *block: continual.best_rank(*block, rank=1)
    )
    expected = expected_step(memory, nearest, gradient(memory, x, y), GAMMA + STRENGTH * DELTA / N)
    with plain(memory, estimator) as optimizer:
        close(taken(memory, lambda: step(optimizer, memory, x, y)), expected)


@pytest.mark.parametrize("of_memory", ["diagonal", "ekfac", "exact"])
def test_other_blocks_count_as_the_products_with_their_partial_traces(of_memory):
    memory, fishers, _ = memory_of(of_memory, tasks=1)
    ((x, y),) = data()
    fisher = kl.estimate_fisher(memory.model, [(x, y)], "classification").to_dense()
    product = continual.blockwise(memory.model, fishers[0], continual.marginal_product)
    nearest = continual.blockwise(
        memory.model, fisher + STRENGTH / N * product, lambda *block: continual.best_rank(*block, rank=1)
    )
    expected = expected_step(memory, nearest, gradient(memory, x, y), GAMMA + STRENGTH * DELTA / N)
    with plain(memory, "kfac") as optimizer:
        close(taken(memory, lambda: step(optimizer, memory, x, y)), expected)


@pytest.mark.parametrize("of_memory", ["diagonal", "kfac", "ekfac", "exact"])
def test_a_diagonal_preconditioner_has_the_diagonal(of_memory):
    memory, fishers, _ = memory_of(of_memory)
    ((x, y),) = data()
    fisher = kl.estimate_fisher(memory.model, [(x, y)], "classification", "diagonal").to_dense()
    total = fisher + STRENGTH / N * torch.diag(sum(fishers).diagonal())
    expected = expected_step(memory, total, gradient(memory, x, y), GAMMA + STRENGTH * DELTA / N)
    with plain(memory, "diagonal") as optimizer:
        close(taken(memory, lambda: step(optimizer, memory, x, y)), expected)


def test_an_eigenbasis_keeps_the_diagonal_in_it():
    memory, fishers, _ = memory_of("kfac")
    ((x, y),) = data()
    with plain(memory, "ekfac") as optimizer:
        g = gradient(memory, x, y)
        seen = taken(memory, lambda: step(optimizer, memory, x, y))
        parts, start = [], 0
        for block in optimizer.blocks.values():
            size = block.shape[0] * block.shape[1]
            of_tasks = sum(fishers)[start : start + size, start : start + size]
            U = torch.kron(*(basis.vectors[0].contiguous() for basis in block.bases()))
            parts.append(U @ torch.diag((U.T @ of_tasks @ U).diagonal()) @ U.T * STRENGTH / N + block.to_dense())
            start += size
    close(seen, expected_step(memory, torch.block_diag(*parts), g, GAMMA + STRENGTH * DELTA / N))


def test_linear_gaussian_tasks_are_each_solved_by_one_undamped_step():
    model = nn.Linear(4, 2).double()
    memory = kl.ContinualLaplace(model, kl.Gaussian(0.5), prior_precision=DELTA, merge="sum")
    xs, ys = torch.randn(3, 15, 4).double(), torch.randn(3, 15, 2).double()
    for x, y in zip(xs, ys, strict=True):
        model.train()
        with kl.NaturalGradient(
            model,
            memory.likelihood,
            damping=kl.damping.Tikhonov(0.0),
            momentum=0.0,
            kl_clip=None,
            sampling="exact",
            curvature_fraction=1.0,
            prior=memory,
        ) as optimizer:
            step(optimizer, memory, x, y, loss=lambda f, y: 2 * (f - y).square().sum() / len(y))
        memory.consolidate([(x, y)])
    inputs = torch.cat([xs.flatten(0, 1), torch.ones(45, 1).double()], 1)
    joint = torch.linalg.solve(4 * inputs.T @ inputs + DELTA * torch.eye(5).double(), 4 * inputs.T @ ys.flatten(0, 1))
    close(torch.cat([model.weight, model.bias[:, None]], 1).detach(), joint.T)


def curvature_of_penalty(memory, delta):
    """``δᵀ P δ`` for the penalty in nats of all data, by its values."""

    def value(move_by):
        changed = copy.deepcopy(memory)
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(memory.model.parameters()) + move_by, changed.model.parameters()
        )
        return changed.penalty().detach()

    return value(delta) + value(-delta) - 2 * value(0 * delta)


def vector(values):
    return torch.cat([v.detach().flatten() for v in values])


@pytest.mark.parametrize("tasks", [0, 2])
def test_the_length_of_a_step_and_the_ratio_are_those_of_the_objective(tasks):
    memory, _, _ = memory_of(tasks=tasks)
    model, damping = memory.model, 0.3
    ((x, y),) = data()
    before, penalty = copies(model), memory.penalty().detach()
    loss = F.cross_entropy(model(x), y).detach()
    g = vector(torch.autograd.grad(F.cross_entropy(model(x), y) + memory.penalty() / N, list(model.parameters())))
    fisher = exact_fisher(model, x)
    settings = {"model_fraction": 1.0, "curvature_fraction": 1.0, "weight_decay": 0.0, "sampling": "exact"}
    rule = kl.damping.LevenbergMarquardt(initial=damping, every=1)
    start = copy.deepcopy(memory)
    with kl.AdaptiveKFAC(model, "classification", damping=rule, prior=memory, **settings) as optimizer:
        step(optimizer, memory, x, y)
        ratio = float(optimizer._ratio.value())
    delta = vector(p - before[name] for name, p in model.named_parameters())
    curvature = delta @ (fisher @ delta) + curvature_of_penalty(start, delta) / N + damping * delta @ delta
    assert float(g @ delta) == pytest.approx(-float(curvature), rel=1e-8)
    change = (F.cross_entropy(model(x), y) - loss + (memory.penalty() - penalty) / N).detach()
    assert ratio == pytest.approx(float(change / (g @ delta + curvature / 2)), rel=1e-6)


def test_the_first_damping_is_the_curvature_of_the_objective_along_the_gradient():
    memory, _, _ = memory_of()
    ((x, y),) = data()
    parameters = list(memory.model.parameters())
    g = vector(torch.autograd.grad(F.cross_entropy(memory.model(x), y) + memory.penalty() / N, parameters))
    expected = g @ (exact_fisher(memory.model, x) @ g) + curvature_of_penalty(memory, g) / N
    with kl.NaturalGradient(memory.model, "classification", prior=memory, model_fraction=1.0) as optimizer:
        step(optimizer, memory, x, y)
        assert optimizer.damping.damping == pytest.approx(float(expected / (g @ g)), rel=1e-8)


def test_a_new_strength_is_in_the_next_step():
    memory, fishers, _ = memory_of("exact")
    ((x, y),) = data()
    fisher = kl.estimate_fisher(memory.model, [(x, y)], "classification", "exact").to_dense()
    with plain(memory, "exact", curvature_every=100, invert_every=100) as optimizer:
        step(optimizer, memory, x, y)
        memory.strength = 10.0
        g = gradient(memory, x, y)
        expected = expected_step(memory, fisher + 10 / N * sum(fishers), g, GAMMA + 10 * DELTA / N)
        close(taken(memory, lambda: step(optimizer, memory, x, y)), expected)


def test_several_passes_and_a_gradient_scaler_leave_the_weight_alone():
    results = []
    for passes, scale in ((1, None), (3, None), (1, 2.0**12)):
        torch.manual_seed(3)
        memory, _, _ = memory_of()
        ((x, y),) = data()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        with plain(memory, "kfac") as optimizer:
            optimizer.zero_grad()
            for i in torch.arange(N).chunk(passes):
                outputs = memory.model(x[i])
                optimizer.update_curvature(outputs)
                loss = (F.cross_entropy(outputs, y[i]) + memory.penalty() / 50) / passes
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            assert float(optimizer._penalty.weight) == pytest.approx(1 / 50)
        results.append(flat(memory.model).detach())
    close(results[1], results[0])
    close(results[2], results[0])


def test_training_resumes_to_the_bit(tmp_path):
    memory, _, _ = memory_of()
    batches = data() + data() + data() + data()
    optimizer = kl.NaturalGradient(memory.model, "classification", prior=memory)
    for x, y in batches[:2]:
        step(optimizer, memory, x, y)
    torch.save((memory.model.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
    for x, y in batches[2:]:
        step(optimizer, memory, x, y)
    expected = flat(memory.model).detach()
    optimizer.close()
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    memory.model.load_state_dict(weights)
    with kl.NaturalGradient(memory.model, "classification", prior=memory) as optimizer:
        optimizer.load_state_dict(state)
        for x, y in batches[2:]:
            step(optimizer, memory, x, y)
    assert torch.equal(flat(memory.model).detach(), expected)


@pytest.mark.parametrize("adapts", [True, False])
@pytest.mark.parametrize("wrong", ["forgotten", "whole"])
def test_a_loss_without_the_penalty_or_with_all_of_it_is_refused(wrong, adapts):
    memory, _, _ = memory_of()
    ((x, y),) = data()
    optimizer = kl.NaturalGradient(memory.model, "classification", prior=memory) if adapts else plain(memory, "kfac")
    before = flat(memory.model).detach()
    with optimizer:
        outputs = memory.model(x)
        optimizer.update_curvature(outputs)
        loss = F.cross_entropy(outputs, y)
        (loss if wrong == "forgotten" else loss + memory.penalty()).backward()
        error, match = {
            "forgotten": (RuntimeError, "its penalty is not part of the loss"),
            "whole": (ValueError, "weight of 1 in the loss, and this step alone has 12 examples"),
        }[wrong]
        with pytest.raises(error, match=match):
            optimizer.step()
        assert torch.equal(flat(memory.model).detach(), before)
        step(optimizer, memory, x, y)  # it goes on
    assert not torch.equal(flat(memory.model).detach(), before)


def test_what_cannot_be_a_prior():
    memory, _, _ = memory_of()
    with pytest.raises(TypeError, match="prior must be a penalty"):
        kl.NaturalGradient(memory.model, "classification", prior=kl.IsotropicPrior(1.0))
    with pytest.raises(ValueError, match="another model's weights"):
        kl.NaturalGradient(network(), "classification", prior=memory)
    with pytest.raises(NotImplementedError, match="block-tridiagonal"):
        kl.NaturalGradient(memory.model, "classification", prior=memory, structure="block-tridiagonal")
    with pytest.raises(NotImplementedError, match='averaging="undamped"'):
        kl.NaturalGradient(
            memory.model,
            "classification",
            prior=memory,
            damping=kl.damping.TraceRestricted(1e-2),
            averaging="damped",
        )


@pytest.mark.parametrize(
    "prior",
    [
        lambda model: kl.IsotropicPrior(2.0, mean=0.1),
        lambda model: kl.LayerwisePrior([1.0, 3.0]),
        lambda model: kl.DiagonalPrior(torch.arange(1, 44).double()),
        lambda model: kl.KronLaplace(model, "classification").fit(data()).as_prior(),
    ],
)
def test_any_prior_is_a_penalty(prior):
    model = network()
    penalty = kl.PriorPenalty(model, prior(model))
    move(model)
    tied = penalty._prior
    weights = {layer.name: layer.matrix() for layer in kl.find_layers(model)}
    close(penalty.penalty().detach(), 0.5 * tied.penalty(weights))
    for name, part in penalty.precision().items():
        v = torch.randn_like(weights[name])
        assert float((v * part.matmul(v)).sum()) == pytest.approx(float(tied.quadratic_form(name, v)))
    ((x, y),) = data()
    with kl.NaturalGradient(model.train(), "classification", prior=penalty) as optimizer:
        outputs = model(x)
        optimizer.update_curvature(outputs)
        (F.cross_entropy(outputs, y) + penalty.penalty() / N).backward()
        optimizer.step()
    with pytest.raises(TypeError, match="must be a prior"):
        kl.PriorPenalty(model, 1.0)


def test_a_second_task_takes_far_fewer_updates_than_adam():
    """The objective of the second of two tasks of digits: 30 steps do better than 90 of Adam."""
    digits = load_digits()
    x, y = torch.tensor(digits.data[:300] / 16), torch.tensor(digits.target[:300])
    model = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)).double()
    memory = kl.ContinualLaplace(model, "classification", merge="kfoc", strength=10.0)
    for _ in range(2):
        x = x[:, torch.randperm(64)]
        ends = []
        start = copy.deepcopy(model.state_dict())
        for natural in (False, True):
            model.load_state_dict(start)
            adam = torch.optim.Adam(model.parameters(), lr=3e-3)
            optimizer = kl.NaturalGradient(model, "classification", prior=memory) if natural else adam
            for i in range(30 if natural else 90):
                rows = torch.arange(100) + 100 * (i % 3)
                optimizer.zero_grad()
                outputs = model(x[rows])
                if natural:
                    optimizer.update_curvature(outputs)
                (F.cross_entropy(outputs, y[rows]) + memory.penalty() / len(x)).backward()
                optimizer.step()
            with torch.no_grad():
                ends.append(float(F.cross_entropy(model(x), y) + memory.penalty() / len(x)))
        optimizer.close()
        memory.consolidate([(x, y)])
    assert ends[1] < 0.9 * ends[0]
