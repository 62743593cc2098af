"""Steps whose length, momentum and damping adapt, against the rule written out again with dense matrices in float64."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import kronlaplace as kl
from kronlaplace.optim.adaptive_steps import AdaptiveSteps
from kronlaplace.optim.step_model import StepModel
from tests.support.assertions import assert_close
from tests.support.natural_gradients import (
    copies,
    exact_fisher,
    flat,
    gradients_of,
    mean_loss,
    natural_direction,
    step,
)
from tests.support.networks import mlp

INITIAL = {"tiny": 1e-8, "by the gradient": None}


def optimizer_of(model, likelihood, initial=None, strategy=kl.damping.FactoredTikhonov, **options):
    """An optimizer whose curvature and inverse are those of each batch; its rule is the default one."""
    rule = None
    if initial is not None:
        rule = kl.damping.LevenbergMarquardt(strategy, initial=initial, every=1, decay=0.7, lower=0.0, upper=0.5)
    defaults = {
        "estimator": "kfac",
        "curvature_every": 1,
        "invert_every": 1,
        "ema_decay": 0.0,
        "sampling": "exact",
        "damping": rule,
    }
    return kl.NaturalGradient(model, likelihood, **{**defaults, **options})


def growth(rejected):
    """By which factor the damping grows after this number of rejected steps in a row: twice as much each time, up to 10."""
    return min(2 ** max(rejected - 1, 0) / 0.7, 10.0)


# -- The rule, with dense matrices -------------------------------------------------------------------------------


class Dense:
    """The rule, for a network whose parameters are one vector; in ``seen`` are the cases that occurred."""

    def __init__(self, model, likelihood, rate, decay, part, every, gamma):
        self.model, self.likelihood, self.rate, self.decay, self.part = model, likelihood, rate, decay, part
        self.every, self.gamma, self.number = every, gamma, 0
        self.last, self.ratio, self.accepted, self.rejected = None, None, True, 0
        self.measured, self.kappas, self.longest = [], [], None
        self.seen = set()

    def step(self, x, y):
        loss = mean_loss(self.likelihood, self.model(x), y)
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        g = torch.cat([v.flatten() for v in gradients]) + self.decay * flat(copies(self.model))
        fisher = exact_fisher(self.model, x[: self.part], self.likelihood) if self.measures else None
        if self.gamma is None:
            self.gamma = float(g @ fisher @ g / (g @ g))
        if self.ratio is not None:
            self.rejected = self.rejected + 1 if math.isnan(self.ratio) else 0
            self.gamma *= 0.7 if self.ratio > 0.5 else growth(self.rejected) if not self.ratio >= 0 else 1.0
            self.gamma = max(self.gamma, 1e-8)
            self.seen.add("shrinks" if self.ratio > 0.5 else "grows" if not self.ratio >= 0 else "stays")
            self.seen |= {"grows faster"} if self.rejected > 1 else set()
            self.ratio = None
        rule = kl.damping.FactoredTikhonov
        natural = flat(natural_direction(self.model, x, y, self.gamma, self.decay, self.likelihood, rule)[0])
        step = self.carry_on(g, natural) if fisher is None else self.measure(x, y, g, fisher, natural)
        self.last = self.rate * step
        self.number += 1
        return self.last

    @property
    def measures(self):
        return self.number % self.every == 0 or not self.accepted

    def measure(self, x, y, g, fisher, natural):
        C = fisher + (self.gamma + self.decay) * torch.eye(len(g))
        damped = math.nan
        if self.last is not None and self.last.any():
            u, exact = self.last / self.size, C - self.gamma * torch.eye(len(g))
            pairs = [((M @ self.last - g) @ u, u @ M @ u) for M in (C, exact)]  # −g before the last step, by each model
            self.measured.append([[float(v) for v in pair] for pair in pairs])
            ages = 0.7 ** torch.arange(len(self.measured) - 1, -1, -1, dtype=torch.float64)
            down, bent = torch.einsum("t,tmv->vm", ages, torch.tensor(self.measured, dtype=torch.float64))
            damped, confirmed = (down / bent).tolist()
            damped = damped if damped < -1 else max(damped, 0.0)
            self.scale = min(max(math.sqrt(max(confirmed, 0.0)), 0.6), 1.0)
        elif not self.measured:
            self.scale = 1.0
        self.seen |= {"scale < 1"} if self.scale < 1 else set()

        V = torch.stack([natural] + ([self.last] if self.last is not None and self.last.any() else []), 1)
        curvature, slopes = V.T @ C @ V, V.T @ g
        kappa = float(curvature[0, 0] / -slopes[0])
        self.kappas.append(kappa)
        self.kappa = self.kappas[0]
        for k in self.kappas[1:]:
            self.kappa = 0.7 * self.kappa + 0.3 * k
        self.seen |= {"raised"} if kappa < self.kappa * (1 - 1e-9) else set()
        curvature[0, 0] = max(curvature[0, 0], -self.kappa * slopes[0])
        c = -self.scale * torch.linalg.solve(curvature, slopes)
        with torch.no_grad():
            loss = float(mean_loss(self.likelihood, self.model(x), y))
        promised = float((self.decay * flat(copies(self.model)) - g) @ (V @ c))
        is_bounded = self.likelihood == "classification" and promised > loss
        if is_bounded:
            self.seen.add("bounded by the loss")
            c = c * loss / promised
            damped = min(damped, 0.5)
        size = float(c @ curvature @ c)
        if self.longest and size > 10 * self.longest:
            self.seen.add("capped")
            c, size = c * math.sqrt(10 * self.longest / size), 10 * self.longest

        step = V @ c
        self.accepted = bool(g @ step + self.beyond(x, y, step) < 0)
        self.seen.add("accepted" if self.accepted else "rejected")
        self.ratio = math.nan if not self.accepted else -1.0 if self.kappa > 2000 else damped
        if self.accepted and self.kappa <= 2000 and math.isnan(damped):
            self.ratio = 0.5  # neither shrinks nor grows
        mu = float(c[1] / self.scale) if len(c) > 1 else 0.0
        self.alpha, self.mu = float(c[0] / self.scale), min(max(mu, 0.0), 0.9)
        self.seen |= {"momentum kept"} if self.mu > 0 else set()
        if not self.accepted:
            self.alpha = self.mu = 0.0
        else:
            self.longest = size
        self.last_curvature = size * self.rate**2 if self.accepted else 0.0
        self.size = self.scale * self.rate
        return step if self.accepted else torch.zeros_like(step)

    def beyond(self, x, y, step):
        """What a step changes beyond its slope: the loss of the part, and weight decay."""
        model, x, y = self.model, x[: self.part], y[: self.part]
        parameters = dict(model.named_parameters())

        def loss(theta):
            parts = theta.split([p.numel() for p in parameters.values()])
            values = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
            return mean_loss(self.likelihood, functional_call(model, values, (x,)), y)

        theta = flat(parameters)
        slope = torch.func.grad(loss)(theta) @ step
        return loss(theta + step) - loss(theta) - slope + self.decay * step @ step / 2

    def carry_on(self, g, natural):
        first = float(-self.kappa * g @ natural)
        mixed, second = float(-self.kappa * g @ self.last), self.last_curvature
        bound = math.sqrt(first * second)
        self.seen |= {"bounded"} if abs(mixed) > bound else set()
        mixed = min(max(mixed, -bound), bound)
        a, m = self.alpha, self.mu
        along = a * a * first + 2 * a * m * mixed + m * m * second
        slope = float(g @ (a * natural + m * self.last))
        share = min(max(-slope / along, 0.0), 1.0)
        self.seen |= {"ends at the minimum"} if share < 1 else set()
        if share**2 * along * self.scale**2 > self.longest:
            self.seen.add("not longer")
            share = math.sqrt(self.longest / (along * self.scale**2))
        self.last_curvature = along * (share * self.scale * self.rate) ** 2
        self.size = self.scale * self.rate
        return share * self.scale * (a * natural + m * self.last)


def batches(likelihood, n, size):
    """Batches of one function, of which a linear part is the same."""
    truth = torch.randn(4, 3).double()
    for _ in range(n):
        x = torch.randn(size, 4).double()
        logits = x @ truth + 0.3 * torch.randn(size, 3).double()
        yield x, logits.argmax(1) if likelihood == "classification" else 3 * logits


def assert_rule(likelihood, rate, decay, initial, every=3, steps=10):
    model, reference = mlp().model.train(), mlp().model.train()
    if initial is not None:
        with torch.no_grad():
            for p in model.parameters():
                p *= 3  # far from the minimum, where a quadratic model is wrong
    reference.load_state_dict(model.state_dict())
    dense = Dense(reference, likelihood, rate, decay, part=6, every=every, gamma=initial)
    options = {"lr": rate, "weight_decay": decay, "model_fraction": 0.5, "model_every": every}
    with optimizer_of(model, likelihood, initial, **options) as optimizer:
        for i, (x, y) in enumerate(batches(likelihood, steps, 12)):
            before = flat(copies(model))
            step(optimizer, model, x, y, likelihood)
            change = flat(copies(model)) - before
            assert_close(change, dense.step(x, y), 1e-6, f"step {i}")  # inverses are in single precision
            assert math.isclose(optimizer.damping.damping, dense.gamma, rel_tol=1e-7), i
            reference.load_state_dict(model.state_dict())  # rounding errors do not add up
            dense.last = change
    return dense.seen


@pytest.mark.parametrize("decay", [0.0, 0.02])
@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("initial", INITIAL)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("every", [1, 3])
def test_adaptive_steps_follow_the_rule(every, likelihood, rate, decay, initial):
    """Parameters and damping, in steps with a measurement and between them."""
    assert_rule(likelihood, rate, decay, INITIAL[initial], every)


def test_the_rule_is_followed_in_all_of_its_cases():
    seen = set()
    for likelihood, seed in (("classification", 2), ("regression", 3), ("regression", 4)):
        torch.manual_seed(seed)
        seen |= assert_rule(likelihood, 1.0, 0.0, INITIAL["tiny"])
    damping = {"shrinks", "stays", "grows", "grows faster"}
    steps = {"accepted", "rejected", "capped", "scale < 1", "bounded by the loss"}
    between = {"momentum kept", "bounded", "raised", "ends at the minimum", "not longer"}
    assert seen == damping | steps | between


@pytest.mark.parametrize("batch_size", [8, 32])
def test_heavy_dropout_does_not_carry_the_weights_away(batch_size):
    """Where steps are not bounded by the loss, that of this network rises above a million."""
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = (x[:, :3].sum(1) > 0).long() + 2 * (x[:, 3] > 0)
    parts = [[nn.Linear(n, 60), nn.GELU(), nn.Dropout(0.5)] for n in (20, 60)]
    model = nn.Sequential(*parts[0], *parts[1], nn.Linear(60, 4))
    losses = []
    with kl.NaturalGradient(model, "classification") as optimizer:
        for _ in range(120):
            rows = torch.randint(512, (batch_size,))
            optimizer.zero_grad()
            outputs = model(x[rows])
            optimizer.update_curvature(outputs)
            loss = nn.functional.cross_entropy(outputs, y[rows])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-40:]) / 40 < 1


def test_the_first_damping_is_the_curvature_along_the_gradient():
    model, (x, y) = mlp().model.train(), next(batches("classification", 1, 7))
    fisher = exact_fisher(model, x)
    with optimizer_of(model, "classification", model_fraction=1.0) as optimizer:
        assert optimizer.damping is None
        step(optimizer, model, x, y)
    g = flat(gradients_of(model))
    assert math.isclose(optimizer.damping.damping, float(g @ fisher @ g / (g @ g)), rel_tol=1e-9)


def test_the_model_is_measured_by_its_period():
    model, measured = mlp().model.train(), []
    every = kl.Period(7, growth=0.4, fewest=2)
    with optimizer_of(model, "classification", model_every=every) as optimizer:
        for i, (x, y) in enumerate(batches("classification", 13, 16)):
            measured += [i] if optimizer._needs_batch() else []
            step(optimizer, model, x, y)
            assert optimizer._accepted.value()
    assert measured == [0, 2, 4, 7, 12]  # 6 - 4 is less than 0.4 * 6, and 12 - 7 is not less than 0.4 * 12


# -- Linear regression, whose model is exact ---------------------------------------------------------------------


def linear():
    """A network whose factors are exact, with inputs."""
    return nn.Linear(4, 3, bias=False).double(), torch.randn(24, 4).double()


def linear_optimizer(model, initial, **options):
    return optimizer_of(model, "regression", initial, kl.damping.Tikhonov, **{"model_fraction": 1.0} | options)


def moved(optimizer, model, x, y):
    """Make a step, and return it with its size in the metric of the damped model, for the learning rate 1."""
    before = flat(copies(model))
    step(optimizer, model, x, y, "regression")
    delta = (flat(copies(model)) - before) / optimizer.param_groups[0]["lr"]
    metric = torch.kron(torch.eye(3).double(), x.T @ x / len(x)) + optimizer.damping.damping * torch.eye(12)
    return delta, float(delta @ metric @ delta)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_equal_batches_confirm_the_steps_of_a_quadratic_loss(rate):
    """The damped model then predicts what the next measurement finds, so the damping shrinks with each of them."""
    (model, x), y = linear(), torch.randn(24, 3).double()
    with linear_optimizer(model, 0.3, lr=rate, model_every=1) as optimizer:
        for i in range(5):
            moved(optimizer, model, x, y)
            assert float(optimizer._adaptive.scale) == 1
            assert math.isclose(optimizer.damping.damping, 0.3 * 0.7 ** max(0, i - 1), rel_tol=1e-9)


def test_noise_shortens_the_steps_and_leaves_the_damping():
    """At the minimum of the expected loss, gradients are noise."""
    model = nn.Linear(4, 60, bias=False).double()
    nn.init.zeros_(model.weight)
    scales, dampings = [], []
    with linear_optimizer(model, None, model_every=1) as optimizer:
        for _ in range(40):
            step(optimizer, model, torch.randn(60, 4).double(), torch.randn(60, 60).double(), "regression")
            scales.append(float(optimizer._adaptive.scale))
            dampings.append(optimizer.damping.damping)
    assert scales[0] == 1 and max(scales[20:]) < math.sqrt(0.5)
    assert dampings == sorted(dampings, reverse=True)


def test_the_damping_grows_until_a_regularizer_that_the_model_does_not_know_is_stable():
    (model, x), y = linear(), torch.randn(24, 3).double()
    curvature = 1e4
    dampings, sizes = [], []
    with linear_optimizer(model, None) as optimizer:
        for _ in range(120):
            optimizer.zero_grad()
            outputs = model(x)
            optimizer.update_curvature(outputs, y)
            penalty = curvature / 2 * model.weight.square().sum()
            ((outputs - y).square().sum() / 48 + penalty).backward()
            optimizer.step()
            dampings.append(optimizer.damping.damping)
            sizes.append(float(model.weight.detach().norm()))
    assert dampings[-1] > 10 * dampings[0]
    assert sizes[-1] < 1e-2 * sizes[0]


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_between_measurements_no_step_is_longer_than_the_last_measured_one(rate):
    """Targets that grow would make it longer; with an exact model its size is known."""
    (model, x), y = linear(), torch.randn(24, 3).double()
    with linear_optimizer(model, 0.3, lr=rate, model_every=10) as optimizer:
        _, first = moved(optimizer, model, x, y)
        sizes = [moved(optimizer, model, x, y * 2**i)[1] for i in range(5)]
    assert all(size <= first * (1 + 1e-6) for size in sizes)
    assert math.isclose(sizes[-1], first, rel_tol=1e-6)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_measured_step_is_at_most_ten_times_the_last_one(rate):
    (model, x), y = linear(), torch.randn(24, 3).double()
    with linear_optimizer(model, 0.3, lr=rate, model_every=1) as optimizer:
        sizes = [moved(optimizer, model, x, y * 1000**i)[1] for i in range(3)]
    assert math.isclose(sizes[1], 10 * sizes[0], rel_tol=1e-6)
    assert math.isclose(sizes[2], 10 * sizes[1], rel_tol=1e-6)


@pytest.mark.parametrize("mean, change", [(1900.0, 0.7), (2100.0, 1 / 0.7)])
def test_the_damping_grows_where_the_curvature_was_far_too_small(mean, change):
    """Inputs that grow by one factor, after the inverse was computed, and targets that confirm the step."""
    (model, x), weight = linear(), torch.randn(3, 4).double()
    growth = math.sqrt((mean - 0.7) / 0.3)  # the mean ratio is then 0.7 · 1 + 0.3 · growth², up to the damping
    options = {"model_every": 1, "curvature_every": 100, "invert_every": 100}
    with linear_optimizer(model, 1e-6, **options) as optimizer:
        moved(optimizer, model, x, x @ weight.T)
        moved(optimizer, model, growth * x, growth * x @ weight.T)
        assert math.isclose(float(optimizer._adaptive.ratio), mean, rel_tol=0.01)
        assert math.isclose(optimizer.damping.damping, 1e-6, rel_tol=1e-9)
        moved(optimizer, model, growth * x, growth * x @ weight.T)
    assert math.isclose(optimizer.damping.damping, 1e-6 * change, rel_tol=1e-9)


def test_weight_decay_counts_once():
    """Near the minimum, a step away from zero increases what weight decay adds, and decreases the objective."""
    (model, x), y = linear(), torch.randn(24, 3).double()
    solution = torch.linalg.solve(x.T @ x / 24 + 0.5 * torch.eye(4), x.T @ y / 24).T
    with torch.no_grad():
        model.weight.copy_(0.98 * solution)
    with linear_optimizer(model, 1e-8, weight_decay=0.5) as optimizer:
        moved(optimizer, model, x, y)
    assert_close(model.weight.detach(), solution, 1e-6)


# -- Steps that are not made -------------------------------------------------------------------------------------


def test_a_step_that_would_increase_the_loss_is_not_made():
    """A model that is wrong about the loss: the parameters stay, the damping grows, and the model is measured again."""
    torch.manual_seed(1)
    model, (x, y) = mlp("regression").model.train(), next(batches("regression", 1, 12))
    with torch.no_grad():
        for p in model.parameters():
            p *= 2
    rejected = []
    with optimizer_of(model, "regression", 1e-6, model_fraction=1.0, model_every=3) as optimizer:
        for i in range(14):
            before, gamma, measures = copies(model), optimizer.damping.damping, optimizer._needs_batch()
            old = float(mean_loss("regression", model(x), y).detach())
            step(optimizer, model, x, y, "regression")
            new = float(mean_loss("regression", model(x), y).detach())
            stays = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            assert stays or not measures or new < old
            assert measures == (i % 3 == 0 or rejected[-1])
            if i and rejected[-1]:
                in_a_row = rejected[::-1].index(False) if False in rejected else len(rejected)
                assert math.isclose(optimizer.damping.damping, gamma * growth(in_a_row), rel_tol=1e-9)
            rejected.append(measures and stays)
    assert rejected[:2] == [True, True] and not rejected[-1]


def test_a_layer_without_gradient_in_the_first_step_follows_between_measurements():
    """It has no last step then."""
    model, (x, y) = mlp().model.train(), next(batches("classification", 1, 16))
    losses = []
    with optimizer_of(model, "classification", model_fraction=1.0, model_every=4) as optimizer:
        for i in range(8):
            optimizer.zero_grad()
            outputs = model(x)
            optimizer.update_curvature(outputs)
            loss = mean_loss("classification", outputs, y)
            loss.backward()
            for p in model[2 * (i % 2)].parameters():
                p.grad = None
            before = flat(copies(model))
            optimizer.step()
            assert not torch.equal(flat(copies(model)), before)
            losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)


# -- Numbers that are given --------------------------------------------------------------------------------------


def vector(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def model_of(curvature, slopes):
    """A model with given numbers."""
    model = StepModel.__new__(StepModel)
    model.curvature, model.slopes = vector([curvature]), vector([slopes])
    model.factor = torch.ones(())
    model.share_of_loss = lambda coefficients: torch.ones(())
    return model


def chosen(steps, model, accepted=True):
    """The coefficients of a measured step, after which the model is kept."""
    steps.confirm(model, vector(0.0))
    coefficients = steps.choose(model)
    steps.keep(model, coefficients, torch.tensor(accepted), 1.0)
    return coefficients


@pytest.mark.parametrize("momentum, kept", [(1.4, 0.9), (0.5, 0.5), (-0.5, 0.0)])
def test_the_momentum_that_is_kept_is_bounded(momentum, kept):
    """Of the measured step itself it is not."""
    steps = AdaptiveSteps()
    coefficients = chosen(steps, model_of([[1.0, 0.0], [0.0, 1.0]], [-0.8, -momentum]))
    assert_close(coefficients, vector([0.8, momentum]), 1e-12)
    assert_close(steps.kept, vector([0.8, kept]), 1e-12)


@pytest.mark.parametrize("slope, scale", [(-0.5, 1.0), (0.0, 1.0), (0.36, 0.8), (0.64, 0.6), (5.0, 0.6)])
def test_steps_are_multiplied_by_the_root_of_what_is_confirmed(slope, scale):
    """The root of ``x = 1 − g'ᵀδ / δᵀFδ``, from 0.6 to 1."""
    steps = AdaptiveSteps()
    chosen(steps, model_of([[1.0]], [-1.0]))
    coefficients = chosen(steps, model_of([[1.0, 0.0], [0.0, 1.0]], [-0.1, slope]))
    assert math.isclose(float(steps.scale), scale, rel_tol=1e-12)
    assert_close(coefficients, scale * vector([0.1, -slope]), 1e-12)


def test_after_a_rejected_step_the_last_one_that_was_made_still_bounds():
    """By ten times its curvature, which is 0.5² · 2."""
    steps = AdaptiveSteps()
    chosen(steps, model_of([[2.0]], [-1.0]))
    chosen(steps, model_of([[200.0, 0.0], [0.0, 1.0]], [-100.0, 0.0]), accepted=False)
    coefficients = chosen(steps, model_of([[200.0, 0.0], [0.0, 0.0]], [-100.0, 0.0]))
    assert math.isclose(200 * float(coefficients[0]) ** 2, 10 * 0.5, rel_tol=1e-12)


def test_a_measurement_without_a_last_step_confirms_nothing():
    steps, model = AdaptiveSteps(), model_of([[1.0]], [-1.0])
    chosen(steps, model)
    assert steps.confirm(model, vector(0.0)).isnan() and steps.sums is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_measurement_that_overflows_does_not_stay(value):
    steps = AdaptiveSteps()
    chosen(steps, model_of([[2.0]], [-1.0]))
    chosen(steps, model_of([[value, 0.0], [0.0, 1.0]], [-1.0, 0.0]), accepted=False)
    assert float(steps.ratio) == 2
    chosen(steps, model_of([[value, value], [value, value]], [-1.0, value]), accepted=False)
    coefficients = chosen(steps, model_of([[2.0, 0.0], [0.0, 1.0]], [-1.0, 0.0]))
    assert_close(coefficients, vector([0.5, 0.0]), 1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_between_measurements_that_overflows_does_not_stay(value):
    steps = AdaptiveSteps()
    chosen(steps, model_of([[2.0]], [-1.0]))
    steps.carry_on(vector([-1.0, value]), 1.0)
    after = steps.carry_on(vector([-1.0, 0.0]), 1.0)
    assert_close(after, vector([0.5, 0.0]), 1e-12)
