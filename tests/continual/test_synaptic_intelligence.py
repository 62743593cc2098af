"""Synaptic Intelligence against path integrals that are computed by hand, in float64."""

import numpy as np
import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support.continual import MultiHead, close, network

N = 20


class Quadratic(nn.Module):
    """Weights whose loss is ``½ (θ − a)ᵀ H (θ − a)``, with its gradient in NumPy."""

    def __init__(self, size=4):
        super().__init__()
        root = np.random.default_rng(0).normal(size=(size, size))
        self.curvature, self.target = root @ root.T / size, np.linspace(-1.0, 1.0, size)
        self.theta = nn.Parameter(torch.ones(size, dtype=torch.float64))

    def forward(self):
        deviation = self.theta - torch.from_numpy(self.target)
        return 0.5 * deviation @ torch.from_numpy(self.curvature) @ deviation

    def loss(self, theta):
        return 0.5 * (theta - self.target) @ self.curvature @ (theta - self.target)

    def gradient(self, theta):
        return self.curvature @ (theta - self.target)


def descend(model, memory, rate, steps, n_examples=N):
    """Train as the documentation says, with plain gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        memory.observe()
        (memory.penalty() / n_examples).backward()
        optimizer.step()


def by_hand(model, tasks, rate, strength, damping):
    """Importances and weights after tasks ``(target, steps)``, one number at a time."""
    theta, importance, center = np.ones(4), np.zeros(4), np.zeros(4)
    for target, steps in tasks:
        model.target = target
        path, start = np.zeros(4), theta.copy()
        for _ in range(steps):
            gradient = model.gradient(theta)
            step = -rate * (gradient + 2 * strength * importance * (theta - center) / N)
            path -= gradient * step
            theta = theta + step
        importance = np.maximum(0.0, importance + N * path / ((theta - start) ** 2 + damping))
        center = theta.copy()
    return importance, theta


@pytest.mark.parametrize("n_tasks", [1, 2, 3])
def test_importances_and_penalty_are_those_by_hand(n_tasks):
    model, strength, damping = Quadratic(), 0.7, 0.02
    memory = kl.SynapticIntelligence(model, strength=strength, damping=damping)
    targets = np.random.default_rng(1).normal(size=(n_tasks, 4))
    tasks = [(target, 3 + i) for i, target in enumerate(targets)]
    for target, steps in tasks:
        model.target = target
        descend(model, memory, 0.05, steps)
        memory.consolidate(N)
    importance, center = by_hand(model, tasks, 0.05, strength, damping)
    close(model.theta.detach(), torch.from_numpy(center))
    close(memory._importances["theta"], torch.from_numpy(importance))
    with torch.no_grad():
        model.theta.add_(torch.tensor([0.1, -0.2, 0.3, 0.4]))
    deviation = model.theta.detach().numpy() - center
    memory.strength = 3.0
    value = memory.penalty()
    close(value.detach(), torch.tensor(3.0 * (importance * deviation**2).sum()))
    (gradient,) = torch.autograd.grad(value, model.theta)
    close(gradient, torch.from_numpy(6.0 * importance * deviation))


def test_the_path_adds_up_to_the_decrease_of_the_loss():
    """Eq. 3: the sum over the weights is the decrease, but for an error in proportion to the length of the steps."""
    errors = []
    for rate, steps in ((0.02, 50), (0.01, 100), (0.005, 200)):
        model = Quadratic()
        memory = kl.SynapticIntelligence(model)
        before = model.loss(np.ones(4))
        descend(model, memory, rate, steps)
        decrease = before - model.loss(model.theta.detach().numpy())
        memory.observe()  # the gradient there does not count before there is another step
        errors.append(float(memory._paths["theta"].integral.sum()) / decrease - 1)
    assert 0 < errors[2] < 0.01
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 2.0, rtol=0.05)


def test_at_a_minimum_the_importance_is_half_the_curvature():
    """Followed to its minimum with rate ``r``, a diagonal quadratic has ``ω/Δ² = h / (2 − r h)``, a geometric series.

    So with small steps a penalty of strength 1 is the loss itself.
    """
    model, rate = Quadratic(), 0.1
    curvature = np.array([0.5, 1.0, 2.0, 4.0])
    model.curvature, model.target = np.diag(curvature), np.array([0.0, -1.0, 2.0, 3.0])
    memory = kl.SynapticIntelligence(model, damping=1e-12)
    descend(model, memory, rate, 400)
    memory.consolidate(N)
    close(memory._importances["theta"], torch.from_numpy(N * curvature / (2 - rate * curvature)), rtol=1e-7)


def test_importance_is_never_negative():
    """Weights that climb count against what they were for before, at most down to zero."""
    model = Quadratic()
    memory = kl.SynapticIntelligence(model)
    descend(model, memory, 0.05, 10)
    memory.consolidate(N)
    before = memory._importances["theta"].clone()
    model.zero_grad()
    model().backward()
    memory.observe()
    with torch.no_grad():
        model.theta.add_(model.theta.grad.sign() * 10 * model.theta.grad.abs())
    memory.consolidate(N)
    assert ((memory._importances["theta"] >= 0) & (memory._importances["theta"] < before)).all()


def step(model, memory, x, y, lr=0.1):
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    memory.observe()
    memory.penalty().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(lr * p.grad)


def test_other_tasks_heads_keep_their_importance_and_the_network_may_grow():
    model = MultiHead(2).double()
    memory = kl.SynapticIntelligence(model)
    x, y = torch.randn(8, 4).double(), torch.randint(2, (8,))
    step(model, memory, x, y)
    memory.consolidate(8, task="one")
    assert list(memory._importances) == ["body.weight", "body.bias", "heads.0.weight", "heads.0.bias"]
    of_head = memory._importances["heads.0.weight"].clone()
    model.task = 1
    model.heads.append(nn.Linear(5, 2).double())
    step(model, memory, x, y)
    memory.consolidate(8)
    assert memory._importances["heads.0.weight"].equal(of_head)
    assert "heads.1.weight" in memory._importances and "heads.2.weight" not in memory._importances
    assert [(task.name, task.layers) for task in memory.tasks] == [
        ("one", ("body", "heads.0")),
        ("task 2", ("body", "heads.1")),
    ]


def test_frozen_parameters_have_no_penalty():
    model = MultiHead(2).double()
    memory = kl.SynapticIntelligence(model)
    step(model, memory, torch.randn(8, 4).double(), torch.randint(2, (8,)))
    memory.consolidate(8)
    with torch.no_grad():
        model.heads[0].weight.add_(1.0)
    assert memory.penalty() > 0
    model.heads[0].requires_grad_(False)
    assert memory.penalty() == 0


def test_a_sequence_that_was_cut_off_in_a_task_goes_on_with_the_same_numbers(tmp_path):
    model, x, y = network(), torch.randn(8, 4).double(), torch.randint(3, (8,))
    memory = kl.SynapticIntelligence(model, strength=2.0, damping=0.3)
    for t in range(2):
        for _ in range(3):
            step(model, memory, x + t, y)
        if t == 0:
            memory.consolidate(8, task="first")
    memory.save(tmp_path / "memory")
    twin = network()
    twin.load_state_dict(model.state_dict())
    loaded = kl.SynapticIntelligence.load(tmp_path / "memory", twin, tasks=["first"])
    assert repr(loaded) == repr(memory) and loaded.tasks == memory.tasks and loaded.n_bytes == memory.n_bytes
    for one in (memory, loaded):
        step(one.model, one, x + 1, y)
        one.consolidate(8)
        step(one.model, one, x, y)
    assert memory.penalty() == loaded.penalty() > 0
    for name, p in model.named_parameters():
        assert p.equal(twin.get_parameter(name))


def test_before_the_first_task_the_penalty_is_zero():
    memory = kl.SynapticIntelligence(network())
    value = memory.penalty()
    value.backward()
    assert value.ndim == 0 and value == 0 and value.dtype == torch.float64
    assert all(p.grad is None for p in memory.model.parameters())


def test_half_precision_weights_have_importances_in_single():
    model = nn.Linear(3, 2).bfloat16()
    memory = kl.SynapticIntelligence(model)
    step(model, memory, torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 0, 1]))
    memory.consolidate(4)
    assert memory._importances["weight"].dtype == memory.penalty().dtype == torch.float32


def test_errors(tmp_path):
    model, x, y = network(), torch.randn(8, 4).double(), torch.randint(3, (8,))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        kl.SynapticIntelligence(3)
    with pytest.raises(ValueError, match="damping must be"):
        kl.SynapticIntelligence(model, damping=0.0)
    memory = kl.SynapticIntelligence(model)
    with pytest.raises(ValueError, match="no step of this task was observed"):
        memory.consolidate(8)
    step(model, memory, x, y)
    with pytest.raises(ValueError, match="n_examples must be"):
        memory.consolidate(0)
    memory.consolidate(8, task="a")
    step(model, memory, x, y)
    with pytest.raises(ValueError, match="the memory has a task 'a' already"):
        memory.consolidate(8, task="a")
    memory.save(tmp_path / "memory")
    with pytest.raises(ValueError, match=r"it has \['a'\], and tasks=\['b'\] was expected"):
        kl.SynapticIntelligence.load(tmp_path / "memory", model, tasks=["b"])
    with pytest.raises(ValueError, match=r"the memory has a parameter '2\.bias', and the model has none"):
        kl.SynapticIntelligence.load(tmp_path / "memory", nn.Sequential(nn.Linear(4, 5)))
    memory.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"'0\.bias' has the shape \(5,\), and the model's \(6,\)"):
        memory.penalty()
    memory.model = model
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the path of '0\.weight' is not finite"):
        memory.consolidate(8)
    assert len(memory.tasks) == 1
