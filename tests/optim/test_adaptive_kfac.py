"""AdaptiveKFAC against conjugate gradients and dense quadratic models, its rules for both dampings, and its checkpoints."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from kronlaplace.damping import FactoredTikhonov, LevenbergMarquardt
from kronlaplace.optim.adaptive_kfac import AdaptiveKFAC
from kronlaplace.optim.parameters import PlainSGD

EXACT = {"sampling": "exact", "curvature_fraction": 1.0, "model_fraction": 1.0}
"""The Fisher without draws, on the whole batch."""


class Sum(nn.Module):
    """Two linear layers side by side: linear in its parameters, with a Fisher that is not block-diagonal."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.left(x[:, :4]) + self.right(x[:, 4:])


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(n=40, features=4, outputs=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, features, generator=generator).double()
    return x, (x @ torch.randn(features, outputs, generator=generator).double()).argmax(1)


def model_at(values):
    model = classifier()
    torch.nn.utils.vector_to_parameters(flat(values), model.parameters())
    return model


def train(optimizer, model, x, y, loss=F.cross_entropy, steps=1):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.update_curvature(outputs)
        value = loss(outputs, y)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def dense_fisher(model, x, metric):
    """The Gauss-Newton matrix of all parameters by autograd."""
    f = model(x)
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(o, [*model.parameters()], retain_graph=True)])
            for o in f.flatten()
        ]
    ).view(*f.shape, -1)
    return torch.einsum("nip,nij,njq->pq", rows, metric(f.detach()), rows) / len(x)


def softmax_metric(f):
    p = torch.softmax(f, dim=1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)


def dense_inverse(optimizer, model, gamma):
    """``F̂(γ)⁻¹`` in the order of the parameters, from the damped factors as the paper prints them."""
    sizes = [p.numel() for p in model.parameters()]
    result = torch.zeros(sum(sizes), sum(sizes)).double()
    offset = 0  # layers without a block stay zero
    for block in optimizer.blocks.values():
        G, A = block.gradient_factor * block.scale, block.activation_factor
        q, p = len(G), len(A)
        pi = math.sqrt((A.trace() / p) / (G.trace() / q))
        dense = torch.kron(G + gamma / pi * torch.eye(q), A + gamma * pi * torch.eye(p))  # rows of [W b]
        columns = torch.arange(q * p).view(q, p)
        order = torch.cat([columns[:, :-1].flatten(), columns[:, -1]])  # W, then b
        result[offset : offset + q * p, offset : offset + q * p] = torch.linalg.inv(dense)[order][:, order]
        offset += q * p
    return result


# -- laws ----------------------------------------------------------------------------------------------------


def test_on_a_quadratic_it_is_preconditioned_conjugate_gradients():
    torch.manual_seed(0)
    model, eta = Sum().double(), 0.05
    x, y = torch.randn(30, 9).double(), torch.randn(30, 3).double()

    def loss(f, y):
        return 0.5 * (f - y).square().sum() / len(f)

    never = 10**6
    rule = LevenbergMarquardt(initial=1e-12, minimum=1e-12, every=never)
    optimizer = AdaptiveKFAC(
        model, kl.Gaussian(1.0), damping=rule, weight_decay=eta, adapt_factors_every=never, ema_decay=0.0, **EXACT
    )
    start = flat(model.parameters())
    matrix = dense_fisher(model, x, lambda f: torch.eye(3).double().expand(len(f), 3, 3)) + eta * torch.eye(len(start))
    gradient = flat(torch.autograd.grad(loss(model(x), y), [*model.parameters()])) + eta * start
    # conjugate gradients for the step, as in every textbook
    solution, residual, direction, before = torch.zeros_like(start), -gradient, None, None
    for _ in range(8):
        train(optimizer, model, x, y, loss)
        inverse = dense_inverse(optimizer, model, math.sqrt(eta))
        solved = inverse @ residual
        now = residual @ solved
        direction = solved if direction is None else solved + now / before * direction
        step = now / (direction @ matrix @ direction)
        solution, residual, before = solution + step * direction, residual - step * (matrix @ direction), now
        torch.testing.assert_close(flat(model.parameters()) - start, solution, rtol=1e-5, atol=1e-7)
    optimum = torch.linalg.solve(matrix, -gradient)
    assert (solution - optimum).norm() < 0.02 * optimum.norm()


@pytest.mark.parametrize("momentum", [False, True])
def test_a_step_has_the_lowest_dense_quadratic_model(momentum):
    model, (x, y), eta = classifier(), data(), 0.01
    optimizer = AdaptiveKFAC(
        model, "classification", damping=LevenbergMarquardt(initial=2.0), weight_decay=eta, momentum=momentum, **EXACT
    )
    last = None
    for _ in range(3):
        before = flat(model.parameters())
        fisher = dense_fisher(model, x, softmax_metric) + (2.0 + eta) * torch.eye(len(before))
        gradient = flat(torch.autograd.grad(F.cross_entropy(model(x), y), [*model.parameters()])) + eta * before
        train(optimizer, model, x, y)
        delta = -dense_inverse(optimizer, model, math.sqrt(2.0 + eta)) @ gradient
        if momentum and last is not None:
            directions = torch.stack([delta, last])
            expected = -torch.linalg.solve(directions @ fisher @ directions.T, directions @ gradient) @ directions
        else:
            expected = -(gradient @ delta) / (delta @ fisher @ delta) * delta
        last = flat(model.parameters()) - before
        torch.testing.assert_close(last, expected, rtol=1e-6, atol=1e-9)


def test_the_best_of_three_factor_dampings_is_kept():
    """It is also used in the following steps, with the blocks of the step in which it was chosen."""
    model, (x, y) = classifier(), data()
    rule = LevenbergMarquardt(initial=0.5, every=1000)
    optimizer = AdaptiveKFAC(
        model, "classification", damping=rule, adapt_factors_every=4, factor_decay=0.3, momentum=False, **EXACT
    )
    gamma = math.sqrt(0.5 + 1e-5)
    assert optimizer.factor_damping == gamma
    train(optimizer, model, x, y, steps=4)

    def terms():
        before = flat(model.parameters())
        shifted = dense_fisher(model, x, softmax_metric) + (0.5 + 1e-5) * torch.eye(len(before))
        gradient = flat(torch.autograd.grad(F.cross_entropy(model(x), y), [*model.parameters()])) + 1e-5 * before
        return before, shifted, gradient

    def step_with(inverse, shifted, gradient):
        delta = -inverse @ gradient
        return -(gradient @ delta) / (delta @ shifted @ delta) * delta

    for _ in range(3):
        before, shifted, gradient = terms()
        train(optimizer, model, x, y)
        inverses = {c: dense_inverse(optimizer, model, c) for c in (gamma, 0.3 * gamma, gamma / 0.3)}
        steps = {c: step_with(inverse, shifted, gradient) for c, inverse in inverses.items()}
        gamma = min(steps, key=lambda c: gradient @ steps[c] + 0.5 * steps[c] @ shifted @ steps[c])
        assert optimizer.factor_damping == pytest.approx(gamma, rel=1e-12)
        torch.testing.assert_close(flat(model.parameters()) - before, steps[gamma], rtol=1e-6, atol=1e-9)
        before, shifted, gradient = terms()
        train(optimizer, model, x, y)
        expected = step_with(inverses[gamma], shifted, gradient)
        torch.testing.assert_close(flat(model.parameters()) - before, expected, rtol=1e-6, atol=1e-9)
        train(optimizer, model, x, y, steps=2)
        assert optimizer.factor_damping == pytest.approx(gamma, rel=1e-12)


# -- damping of the model ------------------------------------------------------------------------------------


def test_the_first_damping_can_be_the_curvature_along_the_gradient():
    model, (x, y), eta = classifier(), data(), 0.03
    optimizer = AdaptiveKFAC(model, "classification", damping=LevenbergMarquardt(), weight_decay=eta, **EXACT)
    gradient = flat(torch.autograd.grad(F.cross_entropy(model(x), y), [*model.parameters()]))
    gradient = gradient + eta * flat(model.parameters())
    expected = gradient @ dense_fisher(model, x, softmax_metric) @ gradient / (gradient @ gradient)
    train(optimizer, model, x, y)
    assert optimizer.damping == pytest.approx(float(expected), rel=1e-9)
    assert optimizer.factor_damping == pytest.approx(math.sqrt(float(expected) + eta), rel=1e-9)


def test_damping_shrinks_while_the_model_is_too_careful():
    model, (x, y) = classifier(), data()
    optimizer = AdaptiveKFAC(model, "classification", **EXACT)
    found = []
    for _ in range(11):
        train(optimizer, model, x, y)
        found.append(optimizer.damping)
    omega = (19 / 20) ** 5
    assert found == pytest.approx([150] * 5 + [150 * omega] * 5 + [150 * omega**2], rel=1e-12)


@pytest.mark.parametrize("targets", ["classification", "regression"])
def test_the_reduction_ratio_is_that_of_the_objective(targets):
    """Measured without targets, it is the ratio of the loss with the targets, weight decay included."""
    model, (x, y), eta = classifier(), data(), 0.03
    loss = F.cross_entropy
    if targets == "regression":
        y = torch.randn(len(x), 3).double()

        def loss(f, y):
            return 0.5 * (f - y).square().sum() / len(f) / 0.7**2

    likelihood = kl.Gaussian(0.7) if targets == "regression" else "classification"
    rule = LevenbergMarquardt(initial=0.2, every=1)
    optimizer = AdaptiveKFAC(model, likelihood, damping=rule, weight_decay=eta, **EXACT)

    def objective():
        return loss(model(x), y).detach() + eta / 2 * flat(model.parameters()).square().sum()

    def metric(f):
        return torch.eye(3).double().expand(len(f), 3, 3) / 0.7**2 if targets == "regression" else softmax_metric(f)

    damping, ratio = 0.2, torch.tensor(0.5).double()
    for _ in range(4):
        before, start = objective(), flat(model.parameters())
        gradient = flat(torch.autograd.grad(loss(model(x), y), [*model.parameters()])) + eta * start
        fisher = dense_fisher(model, x, metric)
        train(optimizer, model, x, y, loss)
        damping = float(rule.updated(damping, ratio))
        assert optimizer.damping == pytest.approx(damping, rel=1e-12)
        step = flat(model.parameters()) - start
        curvature = step @ fisher @ step + (damping + eta) * step @ step
        ratio = (objective() - before) / (gradient @ step + 0.5 * curvature)
        torch.testing.assert_close(optimizer._ratio.value(), ratio, rtol=1e-6, atol=1e-9)


# -- training ------------------------------------------------------------------------------------------------


def test_it_trains():
    model, (x, y) = classifier().float(), data(400)
    optimizer = AdaptiveKFAC(model, "classification", damping=LevenbergMarquardt(initial=1.0))
    losses = train(optimizer, model, x.float(), y, steps=60)
    assert losses[-1] < 0.1 * losses[0]


def test_it_trains_with_the_block_tridiagonal_inverse():
    model, (x, y) = classifier().float(), data(400)
    rule = LevenbergMarquardt(initial=1.0)
    optimizer = AdaptiveKFAC(model, "classification", damping=rule, structure="block-tridiagonal")
    losses = train(optimizer, model, x.float(), y, steps=60)
    assert losses[-1] < 0.1 * losses[0]


def test_parameters_without_a_block_and_groups_with_their_own_weight_decay():
    model, (x, y) = classifier(), data()
    groups = [{"params": model[0].parameters(), "weight_decay": 0.3}, {"params": model[2].parameters()}]
    optimizer = AdaptiveKFAC(model, "classification", params=groups, layers=["0"], others=PlainSGD(lr=0.1), **EXACT)
    before, eta = [p.detach().clone() for p in model.parameters()], torch.tensor([0.3, 0.3, 1e-5, 1e-5])
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), [*model.parameters()])
    gradients = [g + e * p for g, e, p in zip(gradients, eta, before, strict=True)]
    train(optimizer, model, x, y)
    for p, start, g in zip(model[2].parameters(), before[2:], gradients[2:], strict=True):
        torch.testing.assert_close(p.detach(), start - 0.1 * g)
    first = flat(before[:2])
    fisher = dense_fisher(model_at(before), x, softmax_metric)[: len(first), : len(first)]
    gradient = flat(gradients[:2])
    delta = -dense_inverse(optimizer, model, optimizer.factor_damping)[: len(first), : len(first)] @ gradient
    curvature = delta @ fisher @ delta + (150 + 0.3) * delta @ delta
    step = -(gradient @ delta) / curvature * delta
    torch.testing.assert_close(flat(model[0].parameters()) - first, step, rtol=1e-6, atol=1e-12)


def test_a_schedule_scales_the_steps():
    first, second, (x, y) = classifier(), classifier(), data()
    before = flat(first.parameters())
    train(AdaptiveKFAC(first, "classification"), first, x, y)
    optimizer = AdaptiveKFAC(second, "classification")
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5)
    train(optimizer, second, x, y)
    torch.testing.assert_close(flat(second.parameters()) - before, 0.5 * (flat(first.parameters()) - before))


def test_a_closure():
    first, second, (x, y) = classifier(), classifier(), data()
    train(AdaptiveKFAC(first, "classification"), first, x, y)
    optimizer = AdaptiveKFAC(second, "classification")

    def closure():
        optimizer.zero_grad()
        outputs = second(x)
        optimizer.update_curvature(outputs)
        loss = F.cross_entropy(outputs, y)
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    assert torch.equal(flat(first.parameters()), flat(second.parameters()))


@pytest.mark.parametrize("at", [2, 5, 20, 21])
def test_it_resumes_to_the_bit(at):
    (x, y), total = data(), 24
    model = classifier()
    optimizer = AdaptiveKFAC(model, "classification", damping=LevenbergMarquardt(initial=1.0))
    train(optimizer, model, x, y, steps=at)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    train(optimizer, model, x, y, steps=total - at)
    resumed = classifier()
    resumed.load_state_dict(weights)
    other = AdaptiveKFAC(resumed, "classification", damping=LevenbergMarquardt(initial=1.0))
    other.load_state_dict(state)
    train(other, resumed, x, y, steps=total - at)
    assert torch.equal(flat(model.parameters()), flat(resumed.parameters()))
    assert optimizer.damping == other.damping
    assert optimizer.factor_damping == other.factor_damping


def test_a_gradient_that_is_not_finite_changes_nothing():
    model, (x, y) = classifier(), data()
    optimizer = AdaptiveKFAC(model, "classification")
    train(optimizer, model, x, y, steps=2)
    before = flat(model.parameters())
    outputs = model(x)
    optimizer.update_curvature(outputs)
    F.cross_entropy(outputs, y).backward()
    model[0].weight.grad[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'0\.weight' is NaN"):
        optimizer.step()
    assert torch.equal(flat(model.parameters()), before)


def test_a_missing_line_is_named():
    model, (x, y) = classifier(), data()
    optimizer = AdaptiveKFAC(model, "classification")
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="update_curvature"):
        optimizer.step()
    train(optimizer, model, x, y)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="update_curvature"):
        optimizer.step()


def test_arguments_that_are_not_allowed():
    model = classifier()
    with pytest.raises(TypeError, match="NaturalGradient"):
        AdaptiveKFAC(model, "classification", damping=FactoredTikhonov(1.0))
    for name, value in (
        ("factor_decay", 1.0),
        ("lr", -1.0),
        ("weight_decay", -1.0),
        ("model_fraction", 2.0),
        ("ema_decay", 1.0),
    ):
        with pytest.raises(ValueError, match=name):
            AdaptiveKFAC(model, "classification", **{name: value})


@pytest.mark.parametrize("estimator", ["tkfac", "kfoc", "ekfac", "diagonal"])
def test_other_estimators(estimator):
    model, (x, y) = classifier(), data()
    rule = LevenbergMarquardt(initial=1.0)
    optimizer = AdaptiveKFAC(model, "classification", damping=rule, estimator=estimator, adapt_factors_every=3)
    losses = train(optimizer, model, x, y, steps=10)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("training", [False, True])
def test_networks_with_batch_norm_dropout_and_recurrence(training):
    torch.manual_seed(0)
    convolutional = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(27, 3)
    )
    x, y = torch.randn(16, 1, 5, 5), torch.randint(3, (16,))
    model = copy.deepcopy(convolutional).train(training)
    optimizer = AdaptiveKFAC(model, "classification", damping=LevenbergMarquardt(initial=1.0), adapt_factors_every=2)
    losses = train(optimizer, model, x, y, steps=10)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
