"""The natural-gradient optimizer is an optimizer of torch: groups, schedulers, checkpoints, scalers, closures, hooks."""

import copy
import gc
import io
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from tests.support.assertions import assert_close

FIXED = {"damping": kl.damping.FactoredTikhonov(0.1), "lr": 0.3}
ADAPTIVE = {"model_fraction": 1.0}
BOTH = pytest.mark.parametrize("options", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


class Normed(nn.Module):
    """A batch norm and dropout, whose parameters and masks belong to training."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Linear(6, 3)

    def forward(self, x):
        h = F.dropout(self.norm(self.first(x.view(-1, 2, 4))[:, :, :2]).relu(), 0.1, self.training)
        return self.last(h.flatten(1))


def batches(n, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, size, 8, generator=generator)
    return [(x[:, :4].contiguous(), x[:, 4:7].argmax(1)) for x in inputs]


def wide_batches(n):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(12, 8, generator=generator), torch.randint(3, (12,), generator=generator)) for _ in range(n)]


def forward(optimizer, model, x, y):
    """The loss of a batch, with the curvature."""
    outputs = model(x)
    optimizer.update_curvature(outputs)
    return F.cross_entropy(outputs, y)


def step(optimizer, model, x, y):
    optimizer.zero_grad()
    forward(optimizer, model, x, y).backward()
    optimizer.step()


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(model, data, **options):
    """The weights after one step on every batch."""
    with kl.NaturalGradient(model, "classification", **options) as optimizer:
        for x, y in data:
            step(optimizer, model, x, y)
    return values(model)


# -- Groups and schedulers ---------------------------------------------------------------------------------------


def test_it_is_a_torch_optimizer():
    model = network()
    optimizer = kl.NaturalGradient(model, "classification", **FIXED)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in model.parameters()]
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert "NaturalGradient" in repr(optimizer)
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(optimizer))
    seen = []
    step(optimizer, model, *batches(1)[0])
    assert seen == [optimizer]


@pytest.mark.parametrize(
    "form",
    [
        lambda model: model.parameters(),
        lambda model: list(model.parameters()),
        lambda model: model.named_parameters(),
        lambda model: [{"params": model.parameters()}],
        lambda model: [{"params": m.parameters()} for m in model if not isinstance(m, nn.Tanh)],
    ],
    ids=["generator", "list", "named", "one group", "a group for each layer"],
)
def test_parameters_are_given_as_to_any_optimizer(form):
    one, other = network(), network()
    other.load_state_dict(one.state_dict())
    data = batches(3)
    assert torch.equal(train(one, data, **FIXED), train(other, data, params=form(other), **FIXED))


def test_a_scheduler_scales_the_steps():
    """The natural gradient does not depend on the learning rate, by which the step is multiplied."""
    model, (x, y) = network(), batches(1)[0]
    optimizer = kl.NaturalGradient(model, "classification", **FIXED, momentum=0.0, kl_clip=None)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    start, changes = copy.deepcopy(model.state_dict()), []
    for _ in range(3):
        model.load_state_dict(start)
        step(optimizer, model, x, y)
        changes.append(values(model) - torch.cat([p.flatten() for p in start.values()]))
        scheduler.step()
    with kl.NaturalGradient(model, "classification", **{**FIXED, "lr": 0.003}, momentum=0.0, kl_clip=None) as small:
        model.load_state_dict(start)
        step(small, model, x, y)
    assert_close(values(model) - torch.cat([p.flatten() for p in start.values()]), changes[0] / 100, 1e-4)
    assert changes[1].norm() < changes[0].norm() / 5
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0003)


def test_schedules_and_warm_up_reach_every_group():
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters()}]
    others = {"others": kl.PlainSGD(lr=0.05), "layers": ["0", "2"]}
    optimizer = kl.NaturalGradient(
        model, "classification", params=[*groups, {"params": model[4].parameters()}], **FIXED, **others
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.3, 0.05]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.15, 0.025]
    step(optimizer, model, *batches(1)[0])
    scheduler.step()


def test_a_layer_in_two_groups_is_refused():
    model = network()
    groups = [{"params": [model[0].weight]}, {"params": [p for p in model.parameters() if p is not model[0].weight]}]
    message = r"all parameters of layer '0' form one block and must be in the same parameter group"
    with pytest.raises(ValueError, match=message):
        kl.NaturalGradient(model, "classification", params=groups)


def test_groups_are_not_added_later():
    """The blocks are those of the layers that the optimizer knows."""
    model = network()
    optimizer = kl.NaturalGradient(model, "classification", params=[*model[0].parameters(), *model[2].parameters()])
    with pytest.raises(NotImplementedError, match="Pass all of them at once"):
        optimizer.add_param_group({"params": model[4].parameters()})
    assert len(optimizer.param_groups) == 1


# -- Checkpoints -------------------------------------------------------------------------------------------------

VARIANTS = {
    **{estimator: {"estimator": estimator, **FIXED} for estimator in ("kfac", "tkfac", "kfoc", "ekfac", "diagonal")},
    **{f"adaptive {e}": {"estimator": e} for e in ("kfac", "tkfac", "kfoc", "ekfac", "diagonal")},
    "adaptive damping with momentum": {"damping": kl.damping.LevenbergMarquardt(every=2), "momentum": 0.8, "lr": 0.1},
    "weight decay": {**FIXED, "weight_decay": 0.01, "momentum": 0.5},
    "tridiagonal": {**FIXED, "structure": "block-tridiagonal"},
    "adaptive tridiagonal": {"structure": "block-tridiagonal"},
    "exact Tikhonov": {**FIXED, "damping": kl.damping.Tikhonov(0.1)},
    "plain": {**FIXED, "others": kl.PlainSGD(lr=0.1), "layers": ["0", "2"]},
    "adaptive plain": {"others": kl.PlainSGD(lr=0.1), "layers": ["0", "2"]},
    "damped averages": {**FIXED, "averaging": "damped"},
    "part of the batch": {**FIXED, "curvature_fraction": 0.5, "model_fraction": 0.5},
    "often": {**FIXED, "curvature_every": 1, "invert_every": 1},
    "seldom": {**FIXED, "curvature_every": 3, "invert_every": 4},
    "adaptive seldom": {"curvature_every": 3, "invert_every": 4},
    "adaptive between measurements": {"model_every": 3},  # which are in steps 0, 3, and 6
}


def written_and_read(states):
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_resumes(make, data, options, at, passes=1):
    """A run that goes on from a checkpoint, in a model made anew, has the same weights, bit for bit."""

    def go_on(optimizer, scheduler, model, part):
        for i in range(0, len(part), passes):
            optimizer.zero_grad()
            for x, y in part[i : i + passes]:
                (forward(optimizer, model, x, y) / passes).backward()
            optimizer.step()
            scheduler.step()

    def begin(model):
        optimizer = kl.NaturalGradient(model, "classification", **options)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    torch.manual_seed(5)
    model = make()
    optimizer, scheduler = begin(model)
    go_on(optimizer, scheduler, model, data[: at * passes])
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    saved = written_and_read({name: part.state_dict() for name, part in parts.items()})
    random = torch.get_rng_state()
    go_on(optimizer, scheduler, model, data[at * passes :])
    torch.manual_seed(99)
    resumed = make()
    optimizer, scheduler = begin(resumed)
    for name, part in {"model": resumed, "optimizer": optimizer, "scheduler": scheduler}.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(random)
    go_on(optimizer, scheduler, resumed, data[at * passes :])
    assert torch.equal(values(model), values(resumed))
    assert not torch.equal(
        values(model), torch.cat([p.flatten() for p in saved["model"].values()][: len(values(model))])
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_training_resumes_to_the_bit(name):
    for at in (1, 4):
        assert_resumes(network, batches(8), VARIANTS[name], at)


@BOTH
def test_training_with_gradient_accumulation_resumes_to_the_bit(options):
    assert_resumes(network, batches(12), {**options, "curvature_every": 2, "invert_every": 2}, at=3, passes=2)


@BOTH
def test_training_with_batch_norm_and_dropout_resumes_to_the_bit(options):
    data = wide_batches(6)

    def make():
        return Normed()

    torch.manual_seed(5)
    model = make()
    optimizer = kl.NaturalGradient(model, "classification", **options)
    for x, y in data[:3]:
        step(optimizer, model, x, y)
    saved, random = written_and_read([model.state_dict(), optimizer.state_dict()]), torch.get_rng_state()
    resumed = make()
    resumed.load_state_dict(saved[0])
    again = kl.NaturalGradient(resumed, "classification", **options)
    again.load_state_dict(saved[1])
    for one, network_ in ((optimizer, model), (again, resumed)):
        torch.set_rng_state(random)
        for x, y in data[3:]:
            step(one, network_, x, y)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


@BOTH
def test_a_checkpoint_is_not_changed_by_further_steps(options):
    """Neither by those of the optimizer that made it, once it was copied, nor by those of one that loaded it."""
    model, data = network(), batches(6)
    optimizer = kl.NaturalGradient(model, "classification", **options)
    for x, y in data[:3]:
        step(optimizer, model, x, y)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    before = written_and_read(saved)
    ends = []
    for _ in range(2):
        other = network()
        other.load_state_dict(saved[0])
        again = kl.NaturalGradient(other, "classification", **options)
        again.load_state_dict(saved[1])
        for x, y in data[3:]:
            step(again, other, x, y)
        ends.append(values(other))
    assert torch.equal(*ends)
    pairs = list(zip(tensors_in(saved), tensors_in(before), strict=True))
    assert len(pairs) > 20
    assert all(torch.equal(a, b) for a, b in pairs)


def test_checkpoints_of_other_optimizers_are_refused():
    model, other = network(), nn.Sequential(nn.Linear(4, 3))
    optimizer = kl.NaturalGradient(model, "classification", **FIXED)
    with pytest.raises(ValueError, match="the state has no curvature; it is not from NaturalGradient"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())
    with (
        kl.NaturalGradient(other, "classification", **FIXED) as small,
        pytest.raises(ValueError, match="different layers"),
    ):
        optimizer.load_state_dict(small.state_dict())
    with (
        kl.NaturalGradient(network(), "classification", estimator="tkfac", **FIXED) as tkfac,
        pytest.raises(ValueError, match="different estimator"),
    ):
        optimizer.load_state_dict(tkfac.state_dict())


# -- Accumulation, clipping, mixed precision ---------------------------------------------------------------------


def test_two_halves_of_a_batch_are_one_batch():
    """With half of the loss for each; the averages count both as one batch."""
    one, two = network().double(), network().double()
    two.load_state_dict(one.state_dict())
    options = {**FIXED, "sampling": "exact", "kl_clip": None, "ema_decay": 0.5}
    data = [(x.double(), y) for x, y in batches(6)]
    whole = train(one, data, **options)
    with kl.NaturalGradient(two, "classification", **options) as optimizer:
        for x, y in data:
            optimizer.zero_grad()
            for part, labels in zip(x.split(6), y.split(6), strict=True):
                (forward(optimizer, two, part, labels) / 2).backward()
            optimizer.step()
    assert_close(values(two), whole, 1e-10)


def test_two_losses_that_are_propagated_back_together_are_one_batch():
    one, two = network().double(), network().double()
    two.load_state_dict(one.state_dict())
    options = {**FIXED, "sampling": "exact", "kl_clip": None, "ema_decay": 0.5}
    data = [(x.double(), y) for x, y in batches(3)]
    whole = train(one, data, **options)
    with kl.NaturalGradient(two, "classification", **options) as optimizer:
        for x, y in data:
            losses = [
                forward(optimizer, two, part, labels) / 2 for part, labels in zip(x.split(6), y.split(6), strict=True)
            ]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
    assert_close(values(two), whole, 1e-10)


def test_adaptive_steps_with_gradient_accumulation():
    """The loss of the last pass is a part of the objective; its model and its reduction are in the same units."""
    model, x = network().double(), torch.randn(96, 4).double()
    y = x[:, :3].argmax(1)
    with kl.NaturalGradient(model, "classification", model_fraction=1.0) as optimizer:
        before = float(F.cross_entropy(model(x), y).detach())
        for _ in range(10):
            optimizer.zero_grad()
            for part, labels in zip(x.split(32), y.split(32), strict=True):
                (forward(optimizer, model, part, labels) / 3).backward()
            optimizer.step()
        after = float(F.cross_entropy(model(x), y).detach())
    assert after < 0.5 * before


@BOTH
def test_clipped_gradients(options):
    """Clipping acts on the gradient, as with every optimizer: a scaled gradient has a scaled natural gradient."""
    one, two = network().double(), network().double()
    two.load_state_dict(one.state_dict())
    x, y = batches(1)[0]
    norm = nn.utils.get_total_norm(torch.autograd.grad(F.cross_entropy(one(x.double()), y), one.parameters()))
    changes = []
    for model, largest in ((one, 1e9), (two, 0.2 * float(norm))):
        before = values(model).clone()
        optimizer = kl.NaturalGradient(model, "classification", **{**options, "kl_clip": None})
        optimizer.zero_grad()
        forward(optimizer, model, x.double(), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), largest)
        optimizer.step()
        changes.append((values(model) - before) / min(1.0, largest / float(norm)))
    assert_close(changes[1], changes[0], 1e-4)


@BOTH
def test_grad_scaler(options):
    """Powers of two are exact: training with a scaler is training without one."""
    one, two = network(), network()
    two.load_state_dict(one.state_dict())
    data = batches(5)
    plain = train(one, data, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with kl.NaturalGradient(two, "classification", **options) as optimizer:
        for x, y in data:
            optimizer.zero_grad()
            scaler.scale(forward(optimizer, two, x, y)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_close(values(two), plain, 1e-5)


@pytest.mark.parametrize("late", [False, True], ids=["gradients cleared first", "gradients cleared before backward"])
@BOTH
def test_steps_that_a_scaler_leaves_out(options, late):
    """A scaler does not make steps whose gradients overflow; their passes do not count as gradient accumulation."""
    model, data = network(), batches(4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with kl.NaturalGradient(model, "classification", **options) as optimizer:
        for i, (x, y) in enumerate(data):
            before = values(model).clone()
            if not late:
                optimizer.zero_grad()
            loss = forward(optimizer, model, x, y)
            if late:
                optimizer.zero_grad()
            scaler.scale(loss).backward()
            if i == 1:
                model[0].weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            assert len(optimizer._passes) == (1 if i == 1 else 0)
            assert torch.equal(values(model), before) == (i == 1)
        assert scaler.get_scale() == 2.0**9


@BOTH
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(options, inside):
    """The forward pass in bfloat16; the curvature, and the products with it, in float32."""
    one, two = network(), network()
    two.load_state_dict(one.state_dict())
    start, data = values(one).clone(), batches(3)
    single = train(one, data, **options)
    with kl.NaturalGradient(two, "classification", **options) as optimizer:
        for x, y in data:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                outputs = two(x)
                assert outputs.dtype == torch.bfloat16
                if inside:
                    optimizer.update_curvature(outputs)
                    loss = F.cross_entropy(outputs, y)
            if not inside:
                optimizer.update_curvature(outputs)
                loss = F.cross_entropy(outputs.float(), y)
            loss.backward()
            optimizer.step()
    assert values(two).dtype == torch.float32
    assert (values(two) - single).norm() < 0.3 * (single - start).norm()


# -- The loop ----------------------------------------------------------------------------------------------------


@BOTH
def test_closures(options):
    one, two = network(), network()
    two.load_state_dict(one.state_dict())
    data = batches(4)
    plain = train(one, data, **options)
    with kl.NaturalGradient(two, "classification", **options) as optimizer:
        for x, y in data:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = forward(optimizer, two, x, y)
                loss.backward()
                return loss

            before = float(F.cross_entropy(two(x), y).detach())
            assert float(optimizer.step(closure).detach()) == before
    assert torch.equal(values(two), plain)


@BOTH
def test_zero_grad_either_way(options):
    one, two = network(), network()
    two.load_state_dict(one.state_dict())
    data = batches(4)
    plain = train(one, data, **options)
    with kl.NaturalGradient(two, "classification", **options) as optimizer:
        for x, y in data:
            optimizer.zero_grad(set_to_none=False)
            forward(optimizer, two, x, y).backward()
            optimizer.step()
    assert torch.equal(values(two), plain)


@BOTH
def test_frozen_layers_stay(options):
    model = network()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    train(model, batches(4), **options)
    assert torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[2].bias, before[2].bias)
    assert not torch.equal(model[2].weight, before[2].weight)
    assert not torch.equal(model[4].weight, before[4].weight)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.last = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.use_other = True

    def forward(self, x):
        h = self.one(x)
        return self.last((h + self.other(x) if self.use_other else h).tanh())


@BOTH
def test_a_layer_without_gradient_in_a_step_stays(options):
    """As with every optimizer, in a step that does not update the curvature; plain parameters in any step."""
    model = Branches()
    with kl.NaturalGradient(model, "classification", curvature_every=10, invert_every=10, **options) as optimizer:
        step(optimizer, model, *batches(1)[0])
        model.use_other, before = False, copy.deepcopy(model)
        step(optimizer, model, *batches(1)[0])
        assert torch.equal(model.other.weight, before.other.weight)
        assert not torch.equal(model.one.weight, before.one.weight)
    model.use_other = True
    sgd = {"others": kl.PlainSGD(lr=0.1), "layers": ["one", "last"]}
    with kl.NaturalGradient(model, "classification", curvature_every=1, **sgd, **options) as optimizer:
        step(optimizer, model, *batches(1)[0])
        model.use_other, before = False, copy.deepcopy(model)
        step(optimizer, model, *batches(1)[0])
        assert torch.equal(model.other.weight, before.other.weight)
        assert not torch.equal(model.one.weight, before.one.weight)


@BOTH
def test_anomaly_detection(options):
    one, two = network(), network()
    two.load_state_dict(one.state_dict())
    data = batches(3)
    with torch.autograd.set_detect_anomaly(True):
        watched = train(one, data, **options)
    assert torch.equal(watched, train(two, data, **options))


@BOTH
def test_evaluation_between_the_steps_changes_nothing(options):
    """Without gradients; in evaluation mode; with gradients, as for adversarial examples; and between pass and update."""
    one, two = network(), network()
    two.load_state_dict(one.state_dict())
    data = batches(5)
    plain = train(one, data, **options)
    with kl.NaturalGradient(two, "classification", **options) as optimizer:
        for x, y in data:
            with torch.no_grad():
                two(x[:3])
            two.eval()
            noisy = x[:5].clone().requires_grad_()
            torch.autograd.grad(F.cross_entropy(two(noisy), y[:5]), noisy)
            two.train()
            optimizer.zero_grad()
            outputs = two(x)
            with torch.no_grad():
                two(x[:4])
            optimizer.update_curvature(outputs)
            with torch.no_grad():
                two(x[:4])
            F.cross_entropy(outputs, y).backward()
            two(x[:2])
            optimizer.step()
    assert torch.equal(values(two), plain)


@BOTH
@pytest.mark.parametrize("make", [network, Normed])
def test_the_random_state_stays(options, make):
    torch.manual_seed(3)
    model, data = make(), (batches(4) if make is network else wide_batches(4))
    optimizer = kl.NaturalGradient(model, "classification", **options)
    for x, y in data:
        optimizer.zero_grad()
        outputs = model(x)
        before = torch.get_rng_state()
        optimizer.update_curvature(outputs)
        assert torch.equal(torch.get_rng_state(), before)
        F.cross_entropy(outputs, y).backward()
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


# -- The model ---------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("make", [network, Normed])
def test_the_model_computes_the_same(options, make):
    """Outputs and gradients, bit for bit, whether or not the optimizer watches."""
    torch.manual_seed(1)
    watched = make()
    plain = copy.deepcopy(watched)
    optimizer = kl.NaturalGradient(watched, "classification", **options)
    for x, y in batches(3) if make is network else wide_batches(3):
        found = []
        for model in (plain, watched):
            torch.manual_seed(2)
            model.zero_grad()
            outputs = model(x)
            if model is watched:
                optimizer.update_curvature(outputs)
            F.cross_entropy(outputs, y).backward()
            found.append([outputs.detach(), *[p.grad.clone() for p in model.parameters()]])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        optimizer.step()
        plain.load_state_dict(watched.state_dict())


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds) + sum(
        "forward" in vars(m) for m in model.modules()
    )


@pytest.mark.parametrize("make", [network, lambda: nn.Sequential(nn.LSTM(4, 5, batch_first=True))], ids=["mlp", "lstm"])
def test_the_hooks_go_with_the_optimizer(make):
    model = make()
    optimizer = kl.NaturalGradient(model, "classification")
    assert hooks_of(model)
    optimizer.close()
    assert hooks_of(model) == 0
    optimizer.close()
    optimizer = kl.NaturalGradient(model, "classification")
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    assert hooks_of(model) == 0


@BOTH
def test_an_optimizer_that_was_used_is_deleted_with_its_hooks(options):
    model = network()
    optimizer = kl.NaturalGradient(model, "classification", **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step(optimizer, model, *batches(1)[0])
    scheduler.step()
    loss = forward(optimizer, model, *batches(1)[0])
    loss.backward()
    del optimizer, scheduler
    gc.collect()
    assert hooks_of(model) == 0


@BOTH
def test_copies_of_the_model_are_free(options):
    """Copies, and what is written to a file, know nothing of the optimizer, and work."""
    model, data = network(), batches(3)
    optimizer = kl.NaturalGradient(model, "classification", **options)
    step(optimizer, model, *data[0])
    clone = copy.deepcopy(model)
    assert list(torch.load(io.BytesIO(saved(model.state_dict())), weights_only=True)) == list(model.state_dict())
    read = torch.load(io.BytesIO(saved(model)), weights_only=False)
    before = optimizer.blocks["0"].activation_factor.clone()
    for other in (clone, read):
        F.cross_entropy(other(data[1][0]), data[1][1]).backward()
        assert torch.equal(optimizer.blocks["0"].activation_factor, before)
        with kl.NaturalGradient(other, "classification", **options) as own:
            step(own, other, *data[2])
    step(optimizer, model, *data[1])
    assert not torch.equal(values(model), values(clone))


def saved(anything):
    file = io.BytesIO()
    torch.save(anything, file)
    return file.getvalue()


def test_one_optimizer_after_another():
    """The second one begins anew; neither disturbs the other, even at the same time."""
    one, two = network(), network()
    two.load_state_dict(one.state_dict())
    data = batches(4)
    plain = train(one, data, **FIXED)
    bystander = kl.NaturalGradient(two, "classification", estimator="tkfac")
    assert torch.equal(train(two, data, **FIXED), plain)
    bystander.close()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.last = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.recurrent(x.view(-1, 2, 2))[0][:, -1])


@pytest.mark.parametrize("make", [network, Recurrent])
def test_a_fisher_is_estimated_while_an_optimizer_watches(make):
    """Before the first step, to start from it, and between steps."""
    model, data = make(), batches(4)
    expected = kl.estimate_fisher(model, data, "classification")
    with kl.NaturalGradient(model, "classification", **FIXED) as optimizer:
        fisher = kl.estimate_fisher(model, data, "classification")
        optimizer.start_from(fisher, batch_size=12)
        step(optimizer, model, *data[0])
        after = kl.estimate_fisher(model, data, "classification")
        step(optimizer, model, *data[1])
    for name, block in expected.items():
        assert torch.equal(fisher[name].to_dense(), block.to_dense())
        assert not torch.equal(after[name].to_dense(), block.to_dense())


@pytest.mark.parametrize("make", [network, Recurrent])
def test_an_optimizer_is_made_again(make):
    """As by running a notebook's cell twice: the new one is there before the old one goes."""
    model = make()
    optimizer = kl.NaturalGradient(model, "classification", **FIXED)
    step(optimizer, model, *batches(1)[0])
    optimizer = kl.NaturalGradient(model, "classification", **FIXED)
    gc.collect()
    before = values(model).clone()
    step(optimizer, model, *batches(1)[0])
    assert not torch.equal(values(model), before)
    del optimizer
    gc.collect()
    assert hooks_of(model) == 0


@BOTH
def test_memory_of_a_pass_is_released(options):
    """After a step nothing holds the graph or the inputs of the batch."""
    model = network()
    optimizer = kl.NaturalGradient(model, "classification", curvature_every=2, **options)
    for x, y in batches(3):
        inputs = x.clone()
        optimizer.zero_grad()
        outputs = model(inputs)
        optimizer.update_curvature(outputs)
        F.cross_entropy(outputs, y).backward()
        optimizer.step()
        alive = [weakref.ref(t) for t in (inputs, outputs)]
        del inputs, outputs
        gc.collect()
        assert [ref() for ref in alive] == [None, None]


def test_models_with_keywords_and_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, x, *, other=None):
            return self.one(x) + (0 if other is None else self.two(other))

    data = [(torch.randn(12, 4), torch.randn(12, 2), torch.randint(3, (12,))) for _ in range(4)]
    for options in (FIXED, ADAPTIVE):
        model = Two()
        with kl.NaturalGradient(model, "classification", **options) as optimizer:
            for x, other, y in data:
                optimizer.zero_grad()
                outputs = model(x, other=other)
                optimizer.update_curvature(outputs)
                F.cross_entropy(outputs, y).backward()
                optimizer.step()
        assert values(model).isfinite().all()


def test_seeds_repeat():
    """Two runs with one seed are equal to the bit, and differ from those with another."""
    start = network().state_dict()
    ends = []
    for seed in (0, 0, 1):
        model = network()
        model.load_state_dict(start)
        ends.append(train(model, batches(3), seed=seed, **FIXED))
    assert torch.equal(ends[0], ends[1])
    assert not any(torch.equal(a, b) for a, b in itertools.product(ends[:2], ends[2:]))
