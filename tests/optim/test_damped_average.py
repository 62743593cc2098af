"""Averages of factors that are damped in each step, against TKFAC's Algorithm 1 in float64."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import kronlaplace as kl
from tests.support.assertions import assert_close

NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 2, bias=False)
    ),
}
SHAPES = {"linear": (3,), "convolutions": (1, 3, 3)}


def problem(name):
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    return model, [(torch.randn(8, *SHAPES[name]).double(), torch.randn(8, 2).double()) for _ in range(5)]


def optimizer_of(model, damping, **options):
    defaults = {
        "estimator": "tkfac",
        "lr": 0.1,
        "momentum": 0.9,
        "kl_clip": None,
        "curvature_every": 1,
        "invert_every": 1,
        "sampling": "exact",
        "averaging": "damped",
    }
    return kl.NaturalGradient(model, "regression", damping=damping, **{**defaults, **options})


def loss_of(outputs, y):
    return 0.5 * (outputs - y).square().sum() / len(y)


def step(optimizer, model, *batches):
    optimizer.zero_grad()
    for x, y in batches:
        outputs = model(x)
        optimizer.update_curvature(outputs)
        (loss_of(outputs, y) / len(batches)).backward()
    optimizer.step()


def joined(model, named):
    """``[W b]`` of every layer, with leading axes, from tensors by parameter name."""
    result = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        weight = named[f"{name}.weight"]
        flat = weight.flatten(weight.ndim - module.weight.ndim + 1)
        result[name] = flat if module.bias is None else torch.cat([flat, named[f"{name}.bias"].unsqueeze(-1)], dim=-1)
    return result


def unit_factors(model, x):
    """``Φ``, ``Ψ`` and ``δ`` of every layer, from the Jacobian of every output of every example (TKFAC Eq. 4.9)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = joined(model, jacrev(lambda p: functional_call(model, p, (x,)))(parameters))  # (N, C, q, p)
    result = {}
    for name, J in jacobians.items():
        delta = J.square().sum() / len(x)
        phi = torch.einsum("ncij,nckj->ik", J.mT, J.mT) / len(x) / delta
        psi = torch.einsum("ncij,nckj->ik", J, J) / len(x) / delta
        result[name] = phi, psi, delta
    return result


def normal(damping):
    """Eq. 5.15."""

    def damped(model, factors):
        del model
        return {
            name: tuple(delta.sqrt() * f + damping**0.5 * torch.eye(len(f)).double() for f in (phi, psi))
            for name, (phi, psi, delta) in factors.items()
        }

    return damped


def automatic(nu):
    """Eq. 5.16, and Eq. 5.17 for layers that are not convolutions."""

    def damped(model, factors):
        beta = max(max(nu, float(delta)) / float(delta) for _, _, delta in factors.values())
        assert beta > 1.01, "nothing to be seen"
        result = {}
        for name, (phi, psi, delta) in factors.items():
            expanded = delta if isinstance(model.get_submodule(name), nn.Conv2d) else beta * delta
            restricted = expanded.clamp_min(nu)
            result[name] = tuple(
                restricted.sqrt() * f + restricted / len(f) * torch.eye(len(f)).double() for f in (phi, psi)
            )
        return result

    return damped


def algorithm_1(model, batches, damped, epsilon, lr=0.1, tau=0.9, every=1, decay=0.0, start=None):
    """Run TKFAC's Algorithm 1 on the model; without a start, ``ε_k = min(1 − 1/k, ε)``."""
    momentum = {}
    averages = None if start is None else damped(model, start)
    for k, (x, y) in enumerate(batches, start=1):
        new = damped(model, unit_factors(model, x))
        e = epsilon if start is not None else min(1 - 1 / k, epsilon)
        averages = (
            new
            if averages is None
            else {
                name: tuple(e * old + (1 - e) * now for old, now in zip(averages[name], new[name], strict=True))
                for name in new
            }
        )
        if (k - 1) % every == 0:
            inverses = {name: [torch.linalg.inv(f) for f in pair] for name, pair in averages.items()}
        names, parameters = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss_of(model(x), y), parameters)
        gradient = joined(model, {n: g + decay * p.detach() for n, g, p in zip(names, grads, parameters, strict=True)})
        for name, (phi, psi) in inverses.items():
            momentum[name] = tau * momentum.get(name, 0) - lr * psi @ gradient[name] @ phi
            add(model.get_submodule(name), momentum[name])
    return averages


@torch.no_grad()
def add(module, matrix):
    if module.bias is not None:
        module.bias += matrix[:, -1]
        matrix = matrix[:, :-1]
    module.weight += matrix.reshape(module.weight.shape)


def assert_same(model, other, tolerance=1e-9):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), tolerance)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("network", NETWORKS)
def test_normal_damping(network, every):
    model, batches = problem(network)
    other = copy.deepcopy(model)
    with optimizer_of(model, kl.damping.TraceRestricted(0.1), ema_decay=0.6, invert_every=every) as optimizer:
        for batch in batches:
            step(optimizer, model, batch)
        averages = algorithm_1(other, batches, normal(0.1), 0.6, every=every)
        assert_same(model, other)
        for name, block in optimizer.blocks.items():
            assert_close(block.activation_factor, averages[name][0], 1e-9)
            assert_close(block.gradient_factor, averages[name][1], 1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_automatic_damping(network):
    """``ν`` lies above the least trace of a layer, so that ``β`` matters."""
    model, batches = problem(network)
    other = copy.deepcopy(model)
    traces = [float(d) for x, _ in batches for _, _, d in unit_factors(model, x).values()]
    nu = 3 * min(traces)
    with optimizer_of(model, kl.damping.TraceRestrictedAuto(nu), ema_decay=0.6) as optimizer:
        for batch in batches:
            step(optimizer, model, batch)
    algorithm_1(other, batches, automatic(nu), 0.6)
    assert_same(model, other)


@pytest.mark.parametrize("network", NETWORKS)
def test_undamped_averages_expand_linear_layers_too(network):
    """In one step both kinds of averages are the same (TKFAC Eq. 5.17 needs the traces of all layers)."""
    model, batches = problem(network)
    other = copy.deepcopy(model)
    nu = 3 * min(float(d) for _, _, d in unit_factors(model, batches[0][0]).values())
    with optimizer_of(model, kl.damping.TraceRestrictedAuto(nu), averaging="undamped") as optimizer:
        step(optimizer, model, batches[0])
    algorithm_1(other, batches[:1], automatic(nu), 0.95)
    assert_same(model, other)


def test_the_two_averages_differ():
    model, batches = problem("linear")
    other = copy.deepcopy(model)
    for network, averaging in ((model, "damped"), (other, "undamped")):
        with optimizer_of(network, kl.damping.TraceRestricted(0.1), averaging=averaging) as optimizer:
            for batch in batches:
                step(optimizer, network, batch)
    assert (model[0].weight - other[0].weight).abs().max() > 1e-4


def test_a_start_is_damped_once():
    model, batches = problem("linear")
    other = copy.deepcopy(model)
    x = torch.randn(50, 3).double()
    fisher = kl.estimate_fisher(model, [(x,)], "regression", "tkfac")
    start = unit_factors(other, x)
    with optimizer_of(model, kl.damping.TraceRestricted(0.1), ema_decay=0.6) as optimizer:
        optimizer.start_from(fisher, batch_size=8)
        for batch in batches:
            step(optimizer, model, batch)
    algorithm_1(other, batches, normal(0.1), 0.6, start=start)
    assert_same(model, other)


def test_weight_decay_is_in_the_damping():
    """Also when it is changed on the way, as by a scheduler."""
    model, batches = problem("linear")
    other = copy.deepcopy(model)
    with optimizer_of(model, kl.damping.TraceRestricted(0.1), weight_decay=0.2) as optimizer:
        step(optimizer, model, batches[0])
        algorithm_1(other, batches[:1], normal(0.3), 0.95, decay=0.2)
        assert_same(model, other)
        before = optimizer.blocks["0"].activation_factor
        optimizer.param_groups[0]["weight_decay"] = 0.5
        new = normal(0.6)(other, unit_factors(other, batches[1][0]))["0"][0]
        step(optimizer, model, batches[1])
        assert_close(optimizer.blocks["0"].activation_factor, (before + new) / 2, 1e-9)


def test_passes_of_one_step_count_as_one_batch():
    model, batches = problem("linear")
    other = copy.deepcopy(model)
    both = tuple(torch.cat(some) for some in zip(*batches[:2], strict=True))
    averages = []
    for network, first in ((model, batches[:2]), (other, [both])):
        with optimizer_of(network, kl.damping.TraceRestricted(0.1)) as optimizer:
            step(optimizer, network, *first)
            step(optimizer, network, batches[2])
            averages.append(optimizer.blocks)
    assert_same(model, other)
    for one, two in zip(*(blocks.values() for blocks in averages), strict=True):
        assert_close(one.gradient_factor, two.gradient_factor, 1e-9)


def test_reading_the_blocks_changes_nothing():
    model, batches = problem("linear")
    other = copy.deepcopy(model)
    for network, reads in ((model, True), (other, False)):
        with optimizer_of(network, kl.damping.TraceRestricted(0.1)) as optimizer:
            optimizer.zero_grad()
            for x, y in batches[:2]:
                outputs = network(x)
                optimizer.update_curvature(outputs)
                if reads:
                    assert set(optimizer.blocks) == {"0", "2"}
                (loss_of(outputs, y) / 2).backward()
            optimizer.step()
    assert_same(model, other, 0)


@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "sua", kl.KFAC(weight_sharing="reduce")])
@pytest.mark.parametrize("network", NETWORKS)
def test_estimators(network, estimator):
    """The first step is that of undamped averages, which there are none of yet."""
    model, batches = problem(network)
    other = copy.deepcopy(model)
    for net, averaging in ((model, "damped"), (other, "undamped")):
        damping = kl.damping.FactoredTikhonov(0.1)
        with optimizer_of(net, damping, averaging=averaging, estimator=estimator) as optimizer:
            step(optimizer, net, batches[0])
    assert_same(model, other)


def test_other_layers_are_damped_when_they_are_inverted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    other = copy.deepcopy(model)
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    for net, averaging in ((model, "damped"), (other, "undamped")):
        options = {"averaging": averaging, "weight_decay": 0.1}
        with optimizer_of(net, kl.damping.TraceRestricted(0.1), **options) as optimizer:
            step(optimizer, net, (x, y))
            assert isinstance(optimizer.blocks["1"], kl.DiagonalBlock)
    assert_same(model, other)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_checkpoint_goes_on_to_the_bit(at):
    model, batches = problem("linear")
    damping = kl.damping.TraceRestricted(0.1)
    with optimizer_of(model, damping) as optimizer:
        for batch in batches[:at]:
            step(optimizer, model, batch)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        for batch in batches[at:]:
            step(optimizer, model, batch)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, _ = problem("linear")
    with optimizer_of(other, damping) as optimizer:
        optimizer.load_state_dict(saved["optimizer"])
        other.load_state_dict(saved["model"])
        for batch in batches[at:]:
            step(optimizer, other, batch)
    assert_same(model, other, 0)


@pytest.mark.parametrize("saved", ["damped", "undamped"])
def test_checkpoints_of_the_other_average_are_refused(saved):
    model, batches = problem("linear")
    with optimizer_of(model, kl.damping.TraceRestricted(0.1), averaging=saved) as optimizer:
        step(optimizer, model, batches[0])
        state = optimizer.state_dict()
    averaging = "undamped" if saved == "damped" else "damped"
    with (
        optimizer_of(model, kl.damping.TraceRestricted(0.1), averaging=averaging) as optimizer,
        pytest.raises(ValueError, match="different estimator"),
    ):
        optimizer.load_state_dict(state)


FIXED = kl.damping.FactoredTikhonov(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": None}, "fixed damping of factors"),
        ({"damping": kl.damping.LevenbergMarquardt()}, "fixed damping of factors"),
        ({"damping": kl.damping.Tikhonov(0.1)}, "fixed damping of factors"),
        ({"estimator": "ekfac"}, "each batch by itself"),
        ({"estimator": "kfoc"}, "each batch by itself"),
        ({"estimator": "diagonal"}, "each batch by itself"),
        ({"estimator": "kfac", "structure": "block-tridiagonal"}, "block-diagonal"),
        ({"averaging": "both"}, "averaging"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    model, _ = problem("linear")
    with pytest.raises(ValueError, match=message):
        optimizer_of(model, **{"damping": FIXED, **options})


def test_weight_decay_needs_a_damping_with_a_number():
    model, batches = problem("linear")
    with (
        optimizer_of(model, kl.damping.TraceRestrictedAuto(0.1), weight_decay=0.1) as optimizer,
        pytest.raises(NotImplementedError, match="weight decay"),
    ):
        step(optimizer, model, batches[0])


def test_a_deleted_optimizer_leaves_no_hooks():
    model, batches = problem("linear")
    optimizer = optimizer_of(model, FIXED)
    step(optimizer, model, batches[0])
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert not model._forward_pre_hooks
