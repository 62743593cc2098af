"""Estimators in training, where every batch is seen once: by their definitions, and where they end if nothing changes."""

import functools
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kronlaplace as kl
from kronlaplace.layers import find_layers
from kronlaplace.likelihoods import resolve_likelihood
from tests.support import oracles
from tests.support.accumulations import BY_BATCH, ONE_PASS, accumulated, assert_same, one_pass
from tests.support.assertions import assert_blocks_are, assert_close
from tests.support.problems import batches, estimate, problem

DECAY = 0.8
NETWORKS = ["mlp", "cnn", "depthwise", "transformer", "gru", "reused"]
SIZES = (1, 3, 2, 1)
ONLINE = {
    "kfoc": lambda: kl.KFOC().online(),
    "ekfac": lambda: kl.EKFAC().online(),
    "ekfac-kfoc": lambda: kl.EKFAC(basis=kl.KFOC()).online(),
    "ekfac-reduce": lambda: kl.EKFAC(basis=kl.KFAC(weight_sharing="reduce")).online(),
}


def accumulation_of(made, name, decay=DECAY):
    return kl.Accumulation(ONLINE[name](), find_layers(made.model), decay)


def parts(made, sizes=SIZES):
    """Rows of batches, which repeat the examples."""
    return list((torch.arange(sum(sizes)) % len(made.targets)).split(list(sizes)))


def data_of(made, rows):
    return [batches(made, len(part), part)[0] for part in rows]


def weights(rows, decay=DECAY):
    return [decay ** (len(rows) - 1 - i) * len(part) for i, part in enumerate(rows)]


# -- K-FOC ---------------------------------------------------------------------------------------------------


def online_kfoc(group, rows):
    """U ⊗ V / T, each of the three written out."""
    q, p = group.X.shape[2:]
    g, a = torch.eye(q).double() / q**0.5, torch.eye(p).double() / p**0.5
    U, V, T = torch.zeros_like(g), torch.zeros_like(a), 0.0
    for part in rows:
        X = group.X[part]
        U = DECAY * U + torch.einsum("nvij,jk,nvlk->il", X, a, X)
        V = DECAY * V + torch.einsum("nvij,ik,nvkl->jl", X, g, X)
        T = DECAY * T + torch.einsum("nvij,jk,nvlk,il->", X, a, X, g)
        if T > 0:  # else there is no gradient at all
            g, a = U / U.norm(), V / V.norm()
    return 1 / (max(T, 1e-300) * sum(weights(rows))), U, V


def mean_diagonal(X, rows):
    return sum(w * oracles.diagonal(X[part]) for w, part in zip(weights(rows), rows, strict=True)) / sum(weights(rows))


@pytest.mark.quick(3)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("sizes", [SIZES, (2,), (2, 2, 2, 2, 2)])
def test_kfoc_is_one_step_per_batch(network, sizes):
    made, data = problem(network)
    accumulation = accumulation_of(made, "kfoc")
    one_pass(accumulation, made, data_of(made, parts(made, sizes)))
    rows = parts(made, sizes)

    for blocks in (accumulation.so_far(), accumulation.finish()):
        for name, d in data.items():
            by_group = functools.partial(online_kfoc, rows=rows)
            expected = mean_diagonal(d.X, rows) if d.block.diagonal else oracles.block_dense(by_group, d)
            assert_close(blocks[name].to_dense(), expected, 1e-9, name)


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_kfoc_begins_where_the_first_gradients_are(network):
    """A last layer of zeros sends none to the others, and the next batch does."""
    made, _ = problem(network)
    last = [module for module in made.model.modules() if isinstance(module, torch.nn.Linear)][-1]
    weight = last.weight.detach().clone()
    accumulation = accumulation_of(made, "kfoc", 1.0)
    whole = batches(made, 100)
    with torch.no_grad():
        last.weight.zero_()
        try:
            one_pass(accumulation, made, whole)
        finally:
            last.weight.copy_(weight)
    first = accumulation.layers[0].name
    assert (accumulation.so_far()[first].to_dense() == 0).all()
    one_pass(accumulation, made, whole)
    expected = estimate(made, kl.TKFAC())[first].to_dense() / 2
    assert_close(accumulation.so_far()[first].to_dense(), expected, 1e-12)


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_first_batch_of_kfoc_is_tkfac(network):
    made, _ = problem(network)
    accumulation = accumulation_of(made, "kfoc")
    one_pass(accumulation, made, batches(made, 5)[:1])
    expected = kl.estimate_fisher(made.model, batches(made, 5)[:1], made.likelihood, kl.TKFAC(), sampling="exact")
    assert_same(accumulation.finish(), expected, 1e-12)


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", ["mlp", "cnn", "gru", "reused"])
def test_kfoc_of_equal_batches_becomes_the_best_kronecker_product(network):
    made, data = problem(network)
    accumulation = accumulation_of(made, "kfoc", 0.3)
    whole = batches(made, 100)
    for _ in range(60):
        one_pass(accumulation, made, whole)

    def dense(d):
        return oracles.block_dense(oracles.kfoc_full, d)

    assert_blocks_are(accumulation.finish(), data, dense, 1e-6)


def test_kfoc_goes_on_from_a_block():
    """Which is found again, and with which the next step begins."""
    made, _ = problem("cnn")
    blocks = estimate(made, kl.KFOC())
    accumulation = accumulation_of(made, "kfoc")
    accumulation.start_from(blocks, 7.0)
    assert_same(accumulation.so_far(), blocks, 1e-12)
    other = accumulation_of(made, "kfoc", 1.0)
    other.start_from(blocks, 1e12)
    one_pass(other, made, batches(made, 2))
    assert_same(other.finish(), blocks, 1e-8)


def test_kfoc_of_two_workers():
    """From one state on, the sums of both add up, and both factors are those of both."""
    made, _ = problem("mlp")
    start, *data = data_of(made, parts(made))
    whole = accumulated(made, kl.KFOC().online(), [start])
    first, second = (accumulated(made, kl.KFOC().online(), [start]) for _ in range(2))
    for accumulation in (first, second):
        accumulation.decay(0.5)
    one_pass(first, made, data[:1])
    one_pass(second, made, data[1:2])
    for batch in data[:2]:
        saved = {layer.name: dict(whole.state(layer.name)) for layer in whole.layers}
        one_pass(whole, made, [batch])
        for name, state in saved.items():  # as if no factor were renewed in between
            renewed = whole.state(name)
            renewed.update({key: state[key] for key in state if key.startswith("unit")})
            renewed["before"] = (renewed["gradient"] * state["unit gradient"]).sum((1, 2), keepdim=True)
    first.merge(second)
    assert first.weight == whole.weight
    assert_same(first.finish(), whole.finish(), 1e-10)
    empty = kl.Accumulation(kl.KFOC().online(), find_layers(made.model))
    empty.merge(second)
    assert_same(empty.finish(), second.finish(), 1e-12)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_kfoc_in_single_precision_of_tiny_and_of_huge_gradients(scale):
    """Where the product of the two sums is no number in single precision."""
    made, _ = problem("mlp")
    accumulation = accumulation_of(made, "kfoc")
    one_pass(accumulation, made, batches(made, 2))
    layer, state = accumulation.layers[0], accumulation.state("0")
    state = {key: (value if key.startswith("unit") else scale * value).float() for key, value in state.items()}
    block = accumulation.estimators["0"].peek(state, layer, accumulation.weight)
    assert_close(block.to_dense().double() / scale, accumulation.so_far()["0"].to_dense(), 1e-4)


# -- EKFAC ---------------------------------------------------------------------------------------------------


def basis_of(block):
    """Columns are the eigenvectors."""
    pairs = zip(*(basis.vectors for basis in block.bases()), strict=True)
    return torch.block_diag(
        *(torch.kron(gradient.contiguous(), activation.contiguous()) for gradient, activation in pairs)
    )


def in_basis(Q, values):
    return Q @ torch.diag(values) @ Q.T


@pytest.mark.quick(3)
@pytest.mark.parametrize("network", ["mlp", "cnn", "depthwise", "gru", "reused"])
@pytest.mark.parametrize("name", ["ekfac", "ekfac-kfoc"])
def test_ekfac_by_its_definition(name, network):
    """With the basis renewed after the first and the third batch."""
    made, data = problem(network)
    rows = parts(made)
    accumulation, basis = (
        kl.Accumulation(e, find_layers(made.model), DECAY) for e in (ONLINE[name](), ONLINE[name]().basis)
    )
    layers = [layer.name for layer in accumulation.layers if layer.has_kronecker_factors]
    total, expected = 0.0, {}
    for i, (part, batch) in enumerate(zip(rows, data_of(made, rows), strict=True)):
        one_pass(accumulation, made, [batch])
        one_pass(basis, made, [batch])
        blocks, found = basis.so_far(), accumulation.so_far()
        if i == 0:
            assert_same(found, blocks, 1e-12)
        for layer, (Q, values) in expected.items():
            squares = (data[layer].X[part].flatten(2) @ Q).square().sum((0, 1))
            expected[layer] = Q, (DECAY * total * values + squares) / (DECAY * total + len(part))
            assert_close(found[layer].to_dense(), in_basis(*expected[layer]), 1e-9, (layer, i))
        total = DECAY * total + len(part)
        if i in (0, 2):
            accumulation.refresh()
            for layer in layers:
                before = in_basis(*expected[layer]) if i else blocks[layer].to_dense()
                Q = basis_of(blocks[layer])
                expected[layer] = Q, (Q.T @ before @ Q).diagonal()
                assert_close(accumulation.so_far()[layer].to_dense(), in_basis(*expected[layer]), 1e-9, (layer, i))


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", ["mlp", "cnn", "depthwise", "gru", "norms"])
@pytest.mark.parametrize("name", ["ekfac", "ekfac-reduce"])
def test_ekfac_of_equal_batches_becomes_that_of_two_passes(name, network):
    made, data = problem(network)
    accumulation = accumulation_of(made, name, 0.1)
    whole = batches(made, 100)
    for i in range(15):
        one_pass(accumulation, made, whole)
        if i in (0, 3):
            accumulation.refresh()
    blocks = accumulation.finish()
    for layer, block in blocks.items():
        if block.kind == "eigen":
            Q = basis_of(block)
            squares = (data[layer].X.flatten(2) @ Q).square().sum((0, 1)) / len(made.targets)
            assert_close(block.to_dense(), in_basis(Q, squares), 1e-9, layer)
    if name == "ekfac":  # averages over positions leave directions without any input, whose basis is arbitrary
        assert_same(blocks, estimate(made, kl.EKFAC()), 1e-9)


def test_refresh_keeps_the_trace():
    made, _ = problem("cnn")
    accumulation = accumulation_of(made, "ekfac")
    first, second, *_ = batches(made, 2)
    one_pass(accumulation, made, [first])
    accumulation.refresh()
    one_pass(accumulation, made, [second])
    before = {name: block.trace() for name, block in accumulation.so_far().items()}
    accumulation.refresh()
    for name, block in accumulation.so_far().items():
        assert_close(block.trace(), before[name], 1e-12)
        assert (block.eigenvalues() >= 0).all()


def test_second_moments_in_different_bases_do_not_add_up():
    made, _ = problem("mlp")
    first, second = (accumulated(made, kl.EKFAC().online(), [batch]) for batch in batches(made, 2)[:2])
    first.refresh()
    with pytest.raises(
        ValueError, match=r"in different bases cannot be added. Merge accumulations that were copies of"
    ):
        first.merge(second)


@pytest.mark.parametrize("name", ["ekfac", "ekfac-kfoc"])
def test_ekfac_of_two_workers(name):
    made, _ = problem("mlp")
    start, one, other = batches(made, 2)[:3]
    both, first, second = (accumulation_of(made, name, None) for _ in range(3))
    for accumulation in (both, first, second):
        one_pass(accumulation, made, [start])
        accumulation.refresh()
    second.decay(0.0)
    one_pass(first, made, [one])
    one_pass(second, made, [other])
    first.merge(second)
    one_pass(both, made, [one, other])
    for layer in ("0", "2"):  # the eigenvalues; K-FOC's factors go on by steps
        if layer in first.so_far():
            assert_close(first.so_far()[layer].to_dense(), both.so_far()[layer].to_dense(), 1e-10)


# -- all -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "cnn", "norms"])
@pytest.mark.parametrize("name", ONLINE)
def test_blocks_are_positive_semidefinite(name, network):
    made, _ = problem(network)
    accumulation = accumulation_of(made, name)
    for i, batch in enumerate(batches(made, 1) * 2):
        one_pass(accumulation, made, [batch])
        if i % 3 == 2:
            accumulation.refresh()
        for block in accumulation.so_far().values():
            values = torch.linalg.eigvalsh(block.to_dense())
            assert values[0] >= -1e-12 * values[-1]


@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.parametrize("name", ONLINE)
def test_a_checkpoint_goes_on_bit_for_bit(name, refreshed):
    made, _ = problem("cnn")
    first, second, *rest = batches(made, 2)
    straight = accumulation_of(made, name)
    one_pass(straight, made, [first])
    if refreshed:
        straight.refresh()
    one_pass(straight, made, [second])
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    restored = accumulation_of(made, name)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for accumulation in (straight, restored):
        one_pass(accumulation, made, rest)
        accumulation.refresh()
        one_pass(accumulation, made, rest)
    expected = straight.finish()
    for layer, block in restored.finish().items():
        for key, tensor in block.to_tensors().items():
            assert torch.equal(tensor, expected[layer].to_tensors()[key])


@pytest.mark.parametrize("name", ONLINE)
def test_decay_of_everything_changes_no_block(name):
    made, _ = problem("cnn")
    accumulation = accumulation_of(made, name)
    for _ in range(2):
        one_pass(accumulation, made, batches(made, 2))
        before = accumulation.so_far()
        accumulation.decay(0.25)
        assert_same(accumulation.so_far(), before, 1e-12)
        accumulation.refresh()


@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass_is_its_own_version_for_training(name):
    if name != "kfoc-full":
        estimator = ONE_PASS[name]()
        assert estimator.online() is estimator


@pytest.mark.parametrize("name", [*BY_BATCH, *ONLINE])
def test_versions_for_training_make_one_pass(name):
    estimator = {**BY_BATCH, **ONLINE}[name]().online()
    assert estimator.passes == 1
    assert estimator.online() is estimator


def test_estimators_without_a_version_for_training():
    with pytest.raises(
        NotImplementedError, match=r"cannot be used in training.*it keeps all examples\. Use KFAC\(\), TK"
    ):
        kl.KFOC(aggregation="full").online()

    class TwoPasses(kl.Diagonal):
        passes = 2

    with pytest.raises(NotImplementedError, match="it makes 2 passes over the same data"):
        TwoPasses().online()
    with pytest.raises(NotImplementedError, match="it keeps all examples"):
        kl.EKFAC(basis=kl.KFOC(aggregation="full")).online()


class NoWaits(TorchDispatchMode):
    """Refuses to read a value on the host, for which an accelerator would be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("network", ["mlp", "cnn", "gru"])
@pytest.mark.parametrize("name", [*ONLINE, "kfac", "tkfac", "diagonal"])
def test_batches_decay_and_looking_wait_for_no_value(name, network):
    made, _ = problem(network)
    layers = find_layers(made.model)
    accumulation = kl.Accumulation({**ONLINE, **ONE_PASS}[name](), layers, DECAY)
    x, _ = batches(made, 3)[0]
    with kl.NetworkObserver(made.model, layers) as observer:
        for _ in range(2):
            for _ in range(2):
                f = made.model(x)
                with NoWaits():
                    kl.accumulate_batch(
                        observer, f, resolve_likelihood(made.likelihood), kl.DirectionSampling("mc"), accumulation
                    )
                    accumulation.decay(0.5)
                    accumulation.so_far()
            accumulation.refresh()
