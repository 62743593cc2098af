"""Memories in files: what was saved is what is loaded, and a sequence that was cut off resumes to the same weights."""

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support.continual import MultiHead, close, data, learned, move, network, penalty_and_gradient

OPTIONS = [
    {"estimator": "kfac", "merge": "sum"},
    {"estimator": "tkfac", "merge": "kfoc", "rank": 2},
    {"estimator": "ekfac", "merge": "factors"},
    {"estimator": "diagonal", "mode": "per-task"},
    {"estimator": "exact", "merge": "sum"},
]


def same(memory, other):
    """Check that two memories are equal bit for bit."""
    assert repr(memory) == repr(other)
    assert memory.tasks == other.tasks
    assert memory._state.to_json() == other._state.to_json()
    tensors, others = memory._state.to_tensors(), other._state.to_tensors()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]) and tensor.dtype == others[name].dtype, name


@pytest.mark.parametrize("kind", ["mlp", "images"])
@pytest.mark.parametrize("options", OPTIONS)
def test_what_was_saved_is_loaded(tmp_path, options, kind):
    memory = kl.ContinualLaplace(network(kind), "classification", strength=3.0, seed=4, **options)
    learned(memory, kind)
    memory.save(tmp_path / "memory")
    move(memory.model)
    loaded = kl.ContinualLaplace.load(tmp_path / "memory", memory.model)
    same(memory, loaded)
    assert loaded.seed == 4
    value, gradient = penalty_and_gradient(memory)
    again, gradient_again = penalty_and_gradient(loaded)
    assert torch.equal(value, again) and torch.equal(gradient, gradient_again)
    task = data(kind)  # and both go on in the same way
    same(memory.consolidate(task), loaded.consolidate(task))


@pytest.mark.parametrize("prior", ["mean", "layerwise", "diagonal", "kronecker"])
def test_priors_are_loaded(tmp_path, prior):
    model = network()
    mean = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    fisher = kl.estimate_fisher(model, data(), "classification")
    made = {
        "mean": kl.IsotropicPrior(0.3, mean),
        "layerwise": kl.LayerwisePrior([0.3, 2.0]),
        "diagonal": kl.DiagonalPrior({name: 1 + p.detach().square() for name, p in model.named_parameters()}, mean),
        "kronecker": kl.KroneckerPrior(fisher, mean=mean, plus={"0": 0.2, "2": 0.4}, factor=[0.5, 2.0]),
    }
    memory = kl.ContinualLaplace(model, "classification", prior_precision=made[prior])
    memory.save(tmp_path / "memory")
    model[0].requires_grad_(False)  # the prior of a frozen layer is not lost
    loaded = kl.ContinualLaplace.load(tmp_path / "memory", model)
    loaded.save(tmp_path / "memory")
    model[0].requires_grad_(True)
    loaded = kl.ContinualLaplace.load(tmp_path / "memory", model)
    close(penalty_and_gradient(loaded)[1], penalty_and_gradient(memory)[1])
    learned(memory)
    memory.save(tmp_path / "memory")
    move(model)
    loaded = kl.ContinualLaplace.load(tmp_path / "memory", model)
    close(penalty_and_gradient(loaded)[1], penalty_and_gradient(memory)[1])


def train(model, memory, task, optimizer, steps):
    for _ in range(steps):
        for x, y in task:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y, reduction="sum") + memory.penalty()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize("merge", ["sum", "kfoc", "factors"])
def test_a_sequence_that_was_cut_off_resumes_to_the_same_weights(tmp_path, merge):
    tasks = [data() for _ in range(3)]

    def run(model, memory, first, stop_at=None):
        for i in range(first, 3):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for epoch in range(4):
                if (i, epoch) == stop_at:
                    memory.save(tmp_path / "memory")
                    torch.save(model.state_dict(), tmp_path / "weights")
                    return
                train(model, memory, tasks[i], optimizer, 1)
            memory.consolidate(tasks[i], sampling="mc")

    def start():
        torch.manual_seed(3)
        model = network()
        return model, kl.ContinualLaplace(model, "classification", merge=merge, strength=0.1)

    model, memory = start()
    run(model, memory, 0)
    cut, lost = start()
    run(cut, lost, 0, stop_at=(1, 2))
    resumed = network()
    resumed.load_state_dict(torch.load(tmp_path / "weights"))
    loaded = kl.ContinualLaplace.load(tmp_path / "memory", resumed, tasks=["task 1"])
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.01)
    train(resumed, loaded, tasks[1], optimizer, 2)
    loaded.consolidate(tasks[1], sampling="mc")
    run(resumed, loaded, 2)
    same(memory, loaded)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_memory_of_a_network_that_has_grown_and_frozen(tmp_path):
    model = MultiHead(2).double().eval()
    memory = kl.ContinualLaplace(model, "classification", layers=["body", "heads.0", "heads.1"])
    memory.consolidate(data("heads"))
    memory.save(tmp_path / "memory")
    model.heads[0].requires_grad_(False)
    loaded = kl.ContinualLaplace.load(tmp_path / "memory", model)
    model.task = 1
    task = data("heads")
    loaded.consolidate(task)
    memory.consolidate(task)
    same(memory, loaded)
    loaded.save(tmp_path / "memory")  # the frozen head is still in it
    assert kl.ContinualLaplace.load(tmp_path / "memory", model).layers == ["body", "heads.0", "heads.1"]


# -- what must not be loaded -----------------------------------------------------------------------------------


def saved(tmp_path, kind="mlp"):
    memory = kl.ContinualLaplace(network(kind), "classification")
    for name in ("zeros and ones", "twos and threes"):
        memory.consolidate(data(kind), task=name)
    memory.save(tmp_path / "memory")
    return tmp_path / "memory", memory


def test_tasks_in_another_order(tmp_path):
    path, memory = saved(tmp_path)
    names = [task.name for task in memory.tasks]
    assert kl.ContinualLaplace.load(path, memory.model, tasks=names).tasks == memory.tasks
    with pytest.raises(ValueError, match=r"memory of the same tasks in another order: it has .*zeros and ones"):
        kl.ContinualLaplace.load(path, memory.model, tasks=names[::-1])
    with pytest.raises(ValueError, match="memory of other tasks"):
        kl.ContinualLaplace.load(path, memory.model, tasks=names[:1])


def test_another_network(tmp_path):
    path, _ = saved(tmp_path)
    with pytest.raises(ValueError, match=r"the model has no '0.weight'"):
        kl.ContinualLaplace.load(path, network("images"))
    wide = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"as a \(5, 5\) matrix, and the model's holds .* as \(6, 5\)"):
        kl.ContinualLaplace.load(path, wide)
    wide[0].requires_grad_(False)
    with pytest.raises(ValueError, match="it is another network"):
        kl.ContinualLaplace.load(path, wide)


def test_another_file(tmp_path):
    path, memory = saved(tmp_path)
    with pytest.raises(FileNotFoundError):
        kl.ContinualLaplace.load(tmp_path / "other", memory.model)
    kl.KronLaplace(memory.model, "classification").fit(data()).save(tmp_path / "posterior")
    with pytest.raises(ValueError, match="holds a posterior, not a memory"):
        kl.ContinualLaplace.load(tmp_path / "posterior", memory.model)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        kl.ContinualLaplace.load(path, memory.model)
