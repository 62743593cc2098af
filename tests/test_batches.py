"""What a batch may look like, and which axis its examples are on: right or refused, with a message that helps."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

import kronlaplace as kl
from tests.support import oracles
from tests.support.assertions import assert_blocks_are, assert_close
from tests.support.cases import case
from tests.support.inputs import Joined, OneArgument, OneTensor, Options, Positional, WithLogits, fisher_of

ESTIMATORS = {"kfac": oracles.kfac_expand, "tkfac": oracles.tkfac_exact}


def assert_same(actual, expected, rtol=1e-12):
    assert list(actual) == list(expected)
    assert actual.n_examples == expected.n_examples
    for name, block in actual.items():
        assert_close(block.to_dense(), expected[name].to_dense(), rtol, name)
    assert (actual.statistics is None) == (expected.statistics is None)
    if actual.statistics is not None:
        torch.testing.assert_close(actual.statistics, expected.statistics)


# -- forms of inputs -----------------------------------------------------------------------------------------


def joined(kind):
    """A network, its twin that takes one tensor, and data in two batches."""
    model, twin = kind(), OneTensor()
    twin.load_state_dict(model.state_dict())
    x, y = torch.randn(5, 5).double(), torch.randint(3, (5,))
    parts = list(zip(x.split(3), y.split(3), strict=True))
    return model, fisher_of(twin, parts), [(x[:, :2], x[:, 2:], y) for x, y in parts]


FORMS = {
    "tuple": (Positional, lambda a, b: (a, b)),
    "list": (Positional, lambda a, b: [a, b]),
    "keywords": (Positional, lambda a, b: {"b": b, "a": a}),
    "keywords only": (Options, lambda a, b: {"a": a, "b": b}),
    "a number beside them": (Options, lambda a, b: {"a": a, "b": b, "scale": 1.0}),
    "one mapping": (OneArgument, lambda a, b: {"a": a, "b": b}),
    "a tensor without axes": (Options, lambda a, b: {"a": a, "b": b, "scale": torch.tensor(1.0).double()}),
}


@pytest.mark.parametrize("pair", [tuple, list])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_inputs(form, pair):
    kind, make = FORMS[form]
    model, expected, data = joined(kind)
    assert_same(fisher_of(model, [pair([make(a, b), y]) for a, b, y in data]), expected)


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target", "y"])
@pytest.mark.parametrize("kind", [Positional, Options, OneArgument])
def test_a_mapping_with_everything(kind, key):
    model, expected, data = joined(kind)
    assert_same(fisher_of(model, [{"a": a, "b": b, key: y} for a, b, y in data]), expected)


def test_a_mapping_of_inputs_alone():
    model, expected, data = joined(Positional)
    fisher = fisher_of(model, [{"a": a, "b": b} for a, b, _ in data])
    assert fisher.statistics is None
    for name in fisher:
        assert_close(fisher[name].to_dense(), expected[name].to_dense(), 1e-12)
    with (
        pytest.raises(ValueError, match=r'batch 0: sampling="empirical" needs \(inputs, targets\) batches'),
        pytest.warns(),
    ):
        kl.estimate_fisher(model, [{"a": a, "b": b} for a, b, _ in data], "classification", sampling="empirical")


def test_a_mapping_as_inputs_keeps_a_key_that_sounds_like_targets():
    """In a pair the targets are where they are."""

    class Model(Joined):
        def forward(self, a, label):
            return self.run(a, label)

    model, expected, data = joined(Model)
    assert_same(fisher_of(model, [({"a": a, "label": b}, y) for a, b, y in data]), expected)


def test_loaders_and_inputs_alone():
    x, y = torch.randn(5, 5).double(), torch.randint(3, (5,))
    model = OneTensor()
    expected = fisher_of(model, [(x, y)])
    assert_same(fisher_of(model, DataLoader(TensorDataset(x, y), batch_size=2)), expected)
    for data in ([x], [(x,)], [[x]], DataLoader(TensorDataset(x), batch_size=5)):
        alone = fisher_of(model, data)
        assert alone.statistics is None
        assert_close(alone.to_dense(), expected.to_dense(), 1e-12)


class Stream(IterableDataset):
    """Neither a length nor an order of its own: whatever comes."""

    def __init__(self, *tensors):
        self.rows = list(zip(*tensors, strict=True))

    def __iter__(self):
        yield from self.rows


class NoLength(Stream):
    def __len__(self):
        raise NotImplementedError


@pytest.mark.parametrize("stream", [Stream, NoLength])
@pytest.mark.parametrize("progress", [False, True])
def test_loaders_of_streams(stream, progress):
    """In one pass and in several, to fit, tune, train and predict."""
    x, y = torch.randn(5, 5).double(), torch.randint(3, (5,))
    loader = DataLoader(stream(x, y), batch_size=2)
    model = OneTensor()
    for estimator in ("tkfac", "ekfac"):
        expected = fisher_of(model, [(x, y)], estimator)
        assert_same(fisher_of(model, loader, estimator, progress=progress), expected, 1e-9)
    posterior = kl.KronLaplace(model, "classification").fit(loader, progress=progress)
    posterior.tune("validation", data=loader, grid=[1.0], progress=progress)
    torch.testing.assert_close(posterior.predict(loader, progress=progress), posterior.predict(x))
    kl.train_by_evidence(model, loader, "classification", epochs=1, progress=progress)


class Output:
    def __init__(self, logits):
        self.loss, self.logits = None, logits


class OutputMapping(dict):
    """As Hugging Face's: a mapping whose entries are attributes, too."""

    def __getattr__(self, name):
        return self[name] if name in self else self.missing(name)

    def missing(self, name):
        raise AttributeError(name)


@pytest.mark.parametrize(
    "make",
    [Output, lambda f: {"logits": f}, lambda f: OutputMapping(logits=f, hidden_states=(f,))],
    ids=["object", "dict", "both"],
)
def test_outputs_with_logits(make):
    model = WithLogits(make)
    x, y = torch.randn(5, 5).double(), torch.randint(3, (5,))
    actual, expected = fisher_of(model, [(x, y)]), fisher_of(model.inner, [(x, y)])
    assert [name.removeprefix("inner.") for name in actual] == list(expected)
    assert_close(actual.to_dense(), expected.to_dense(), 1e-12)


@pytest.mark.parametrize(
    "make", [lambda f: (f,), lambda f: {"scores": f}, lambda f: Output((f,))], ids=["tuple", "dict", "nested"]
)
def test_outputs_without_logits(make):
    x = torch.randn(5, 5).double()
    with pytest.raises(
        TypeError, match=r"the model must return a tensor of outputs \(or an object with a tensor `logits`\)"
    ):
        fisher_of(WithLogits(make), [x])


@pytest.mark.parametrize("form", ["leaf", "inside a graph"])
def test_inputs_that_require_gradients(form):
    x, y = torch.randn(5, 5).double(), torch.randint(3, (5,))
    model = OneTensor()
    expected = fisher_of(model, [(x, y)])
    leaf = x.clone().requires_grad_()
    given = leaf if form == "leaf" else leaf * 1
    assert_same(fisher_of(model, [(given, y)]), expected)
    assert leaf.grad is None
    assert given.requires_grad
    posterior = kl.KronLaplace(model, "classification").fit([(given, y)])
    assert_close(posterior.functional_variance(given), posterior.functional_variance(x), 1e-12)
    assert leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool])
def test_integer_inputs(dtype):
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()

        def forward(self, x):
            return self.inner(x.double() / 3)

    model, x, y = Pixels(), torch.randint(2, (5, 5)).to(dtype), torch.randint(3, (5,))
    expected = fisher_of(model.inner, [(x.double() / 3, y)])
    assert_close(fisher_of(model, [(x, y)]).to_dense(), expected.to_dense(), 1e-12)


# -- where the examples are ----------------------------------------------------------------------------------


class TimeFirst(nn.Module):
    """Inputs (T, N, F), outputs (N, C)."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.token(x)).mean(0))


class Transposed(TimeFirst):
    def forward(self, x):
        return super().forward(x.transpose(0, 1))


def check(model, x, outputs=2, size=None):
    """The blocks are what the oracles say, for each estimator."""
    made = case(model, x, outputs)
    data = oracles.gradients(made.model, made.inputs, made.likelihood)
    for name, rule in ESTIMATORS.items():
        fisher = fisher_of(made.model, made.batches(size or len(x)), name)
        assert fisher.n_examples == len(x)
        assert_blocks_are(fisher, data, lambda d, rule=rule: oracles.block_dense(rule, d))
    return made


@pytest.mark.parametrize(("n", "t"), [(3, 3), (2, 4), (4, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_time_first(name, n, t):
    x = torch.randn(n, t, 2).double()
    made = case(Transposed(), x, 2)
    model = TimeFirst().double()
    model.load_state_dict(made.model.state_dict())
    expected = fisher_of(made.model, [(x, made.targets)], name)
    assert_same(fisher_of(model, [(x.transpose(0, 1), made.targets)], name), expected)


@pytest.mark.parametrize("family", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize(("n", "t"), [(3, 3), (2, 4), (4, 2)])
def test_recurrent_layers_with_time_first(family, n, t):
    class Model(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.recurrent, self.head = family(2, 2, batch_first=batch_first), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.recurrent(x)[0].select(int(self.recurrent.batch_first), -1))

    x, y = torch.randn(n, t, 2).double(), torch.randint(2, (n,))
    twin, model = Model(True).double(), Model(False).double()
    model.load_state_dict(twin.state_dict())
    assert_same(fisher_of(model, [(x.transpose(0, 1), y)]), fisher_of(twin, [(x, y)]))


class Folded(nn.Module):
    """The positions are folded into the axis of the examples, as many code bases do it."""

    def __init__(self, how):
        super().__init__()
        self.token, self.norm, self.head, self.how = nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2), how

    def forward(self, x):
        n, t, features = x.shape
        if self.how == "not":
            return self.head(torch.tanh(self.norm(self.token(x))).mean(1))
        if self.how == "example-major":
            h = self.norm(self.token(x.reshape(n * t, features)))
            return self.head(torch.tanh(h).view(n, t, -1).mean(1))
        h = self.norm(self.token(x.transpose(0, 1).reshape(t * n, features)))
        return self.head(torch.tanh(h).view(t, n, -1).mean(0))


@pytest.mark.parametrize(("n", "t"), [(3, 3), (2, 4), (4, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "kfoc", "ekfac", "sua", "diagonal", "exact"])
def test_positions_folded_into_the_examples(estimator, n, t):
    x = torch.randn(n, t, 2).double()
    made = case(Folded("example-major"), x, 2)
    folded = fisher_of(made.model, [(x, made.targets)], estimator)
    made.model.how = "not"
    assert_same(folded, fisher_of(made.model, [(x, made.targets)], estimator), 1e-9)


@pytest.mark.parametrize("n", [2, 3])
def test_positions_folded_the_other_way_round_are_refused(n):
    """Rows n, n + N, n + 2N… belong together, which nothing tells."""
    made = case(Folded("time-major"), torch.randn(n, 3, 2), 2)
    message = (
        rf"layer 'token' \(Linear\) got an input of shape \({3 * n}, 2\) in a batch of {n} examples; it must be "
        r"\(examples, \.\.\., 2\), so that gradients belong to examples. Keep the examples on the first axis"
    )
    with pytest.raises(NotImplementedError, match=message):
        fisher_of(made.model, [(made.inputs, made.targets)])


def test_folded_convolutions():
    """Frames of a film go through one convolution."""

    class Film(nn.Module):
        def __init__(self, fold):
            super().__init__()
            self.conv, self.head, self.fold = nn.Conv2d(1, 2, 2), nn.Linear(2, 2), fold

        def forward(self, x):
            n, t = x.shape[:2]
            if self.fold:
                h = self.conv(x.flatten(0, 1)).mean((2, 3)).view(n, t, -1).mean(1)
            else:
                h = torch.stack([self.conv(frame).mean((2, 3)) for frame in x.unbind(1)]).mean(0)
            return self.head(h)

    x = torch.randn(3, 4, 1, 3, 3).double()
    made = case(Film(True), x, 2)
    for estimator in ("kfac", "sua", "tkfac", "kfoc", "ekfac"):
        made.model.fold = True
        folded = fisher_of(made.model, [(x, made.targets)], estimator)
        made.model.fold = False  # a module that is used several times
        assert_same(folded, fisher_of(made.model, [(x, made.targets)], estimator), 1e-9)


class Positions(nn.Module):
    """Learned positions, the same for all examples."""

    def __init__(self, axes, table, length=4):
        super().__init__()
        self.token, self.table, self.head = nn.Embedding(5, 3), table, nn.Linear(3, 2)
        self.axes = axes

    def forward(self, x):
        positions = torch.arange(x.shape[1])
        positions = positions[None] if self.axes == 2 else positions
        if isinstance(self.table, nn.Linear):  # something to multiply, (T, F) or (1, T, F)
            positions = torch.stack([positions.double().sin(), positions.double().cos()], dim=-1)
        return self.head(torch.tanh(self.token(x) + self.table(positions)).mean(1))


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("table", ["embedding", "linear"])
@pytest.mark.parametrize(("n", "t"), [(4, 4), (3, 4), (4, 3), (1, 4), (6, 2), (2, 4), (4, 1)])
def test_position_embeddings(n, t, table, axes):
    table = {"embedding": lambda: nn.Embedding(4, 3), "linear": lambda: nn.Linear(2, 3)}[table]()
    check(Positions(axes, table), torch.randint(5, (n, t)))


SHAPED = {
    "[None]": lambda p, n: p[None],
    "unsqueezed and expanded": lambda p, n: p.unsqueeze(0).expand(n, -1, -1),
    "repeated": lambda p, n: p.repeat(n, 1, 1),
    "cut": lambda p, n: torch.cat([p, p])[: len(p)],
}


@pytest.mark.parametrize(("n", "t"), [(4, 4), (3, 4), (2, 4), (4, 1)])
@pytest.mark.parametrize("shaped", SHAPED)
def test_position_embeddings_that_are_shaped_on_the_way(shaped, n, t):
    """Right or refused: the output that a layer gives is expanded over the examples, which not all code bears."""

    class Model(Positions):
        def forward(self, x):
            positions = SHAPED[shaped](self.table(torch.arange(x.shape[1])), len(x))
            return self.head(torch.tanh(self.token(x) + positions).mean(-2))

    try:
        check(Model(1, nn.Embedding(4, 3)), torch.randint(5, (n, t)))
    except (ValueError, NotImplementedError, RuntimeError):
        return


@pytest.mark.parametrize(("n", "t"), [(3, 3), (2, 3), (3, 2), (4, 1)])
def test_position_embeddings_with_time_first_inside(n, t):
    """Right or refused, as before."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position, self.head = nn.Embedding(5, 3), nn.Embedding(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            positions = self.position(torch.arange(x.shape[1])).unsqueeze(1)
            return self.head(torch.tanh(self.token(x.T) + positions).mean(0))

    try:
        check(Model(), torch.randint(5, (n, t)))
    except (ValueError, NotImplementedError, RuntimeError):
        return


@pytest.mark.parametrize(
    "n",
    [
        2,
        4,
        3,
    ],
)
def test_a_layer_on_something_that_is_no_input(n):
    """Three codes, the same for all examples, go through a layer: right or refused, also for three examples."""

    class Codebook(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.head = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)
            self.register_buffer("codes", torch.randn(3, 2))

        def forward(self, x):
            return self.head(torch.softmax(self.query(x) @ self.key(self.codes).mT, dim=-1))

    try:
        check(Codebook(), torch.randn(n, 2))
    except (ValueError, NotImplementedError, RuntimeError):
        return


def test_a_last_batch_of_another_size():
    """Axes are found batch by batch."""
    check(Positions(1, nn.Embedding(4, 3)), torch.randint(5, (7, 4)), size=4)


def test_predictions_see_the_same_axes():
    x = torch.randint(5, (4, 4))
    made = check(Positions(1, nn.Embedding(4, 3)), x)
    posterior = kl.KronLaplace(made.model, "classification").fit([(x, made.targets)])
    one_by_one = torch.cat([posterior.functional_variance(part) for part in x.split(1)])
    assert_close(posterior.functional_variance(x), one_by_one, 1e-10)


@pytest.mark.parametrize(
    "t",
    [3, 20],
)
def test_predictions_with_time_first_are_right_or_refused(t):
    """Never the time axis cut into chunks as if it were the examples."""
    x, y = torch.randn(3, t, 2).double(), torch.randint(2, (3,))
    twin = Transposed().double()
    model = TimeFirst().double()
    model.load_state_dict(twin.state_dict())
    expected = kl.KronLaplace(twin, "classification").fit([(x, y)]).functional_variance(x)
    posterior = kl.KronLaplace(model, "classification").fit([(x.transpose(0, 1), y)])
    try:
        actual = posterior.functional_variance(x.transpose(0, 1))
    except (ValueError, NotImplementedError):
        return
    assert_close(actual, expected, 1e-10)


# -- refusals, as a newcomer reads them ----------------------------------------------------------------------

X, Y = torch.randn(4, 5).double(), torch.randint(3, (4,))


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return X[i], Y[i]


WRAP = r"Wrap a single batch in a list, \[\(inputs, targets\)\], a Dataset in a DataLoader"
BATCH = r"batch 0: expected a pair \(inputs, targets\), a tensor of inputs, or a mapping; got "
REFUSED = {
    "a tensor": (X, TypeError, rf"data must be an iterable of .* batches.*; got Tensor. {WRAP}"),
    "a pair": ((X, Y), TypeError, rf"got tuple. {WRAP}"),
    "a mapping": ({"x": X}, TypeError, rf"got dict. {WRAP}"),
    "a dataset": (Images(), TypeError, rf"got Images. {WRAP}"),
    "nothing": (None, TypeError, rf"got NoneType. {WRAP}"),
    "no batch": ([], ValueError, "the data is empty: no batch came out of the loader"),
    "three tensors": (
        [(X, X, Y)],
        TypeError,
        BATCH + r"tuple of 3: Tensor, Tensor, Tensor.*give several inputs as \(\(x1, x2\), targets\)",
    ),
    "arrays": (
        [(np.zeros((4, 5)), Y)],
        TypeError,
        BATCH + "tuple of 2: ndarray, Tensor. Turn arrays into tensors with",
    ),
    "targets in an array": ([(X, np.zeros(4))], TypeError, BATCH + "tuple of 2: Tensor, ndarray. Turn arrays into"),
    "targets in a list": ([(X, [0, 1, 2, 0])], TypeError, BATCH + "tuple of 2: Tensor, list"),
    "text": (["ab"], TypeError, BATCH + "str"),
    "a mapping of text": ([{"a": "b"}], TypeError, BATCH + "dict"),
    "a mapping of targets alone": ([{"labels": Y}], TypeError, BATCH + "dict"),
    "two keys for targets": (
        [{"x": X, "y": Y, "labels": Y}],
        TypeError,
        r"batch 0: \['labels', 'y'\] could all be the targets",
    ),
    "no example": ([(X[:0], Y[:0])], ValueError, r"batch 0: has no examples \(inputs of shape \(0, 5\)\)"),
    "targets of some": ([(X, Y), (X,)], ValueError, "batch 1: targets must come with every batch or with none"),
    "infinite": ([(X, Y), (X / 0, Y)], ValueError, "batch 1: the inputs contain NaN or infinite values"),
    "infinite among several": (
        [((X[:, :2], X[:, 2:] / 0), Y)],
        ValueError,
        "batch 0: the inputs contain NaN or infinite values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    data, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        fisher_of(Positional() if "among" in name else OneTensor(), data)


def test_a_mapping_that_the_network_does_not_take():
    """The network's own complaint comes through."""
    with pytest.raises(KeyError, match="a"):
        fisher_of(OneArgument(), [({"c": X, "b": X}, Y)])


def test_too_many_inputs():
    with pytest.raises(TypeError, match="positional argument"):
        fisher_of(OneTensor(), [((X, X), Y)])


@pytest.mark.parametrize("call", ["functional_variance", "predict"])
def test_posteriors_predict_from_what_they_were_fitted_to(call):
    model, _, data = joined(OneArgument)
    posterior = kl.KronLaplace(model, "classification").fit([({"a": a, "b": b}, y) for a, b, y in data])
    a, b, _ = data[0]
    assert len(getattr(posterior, call)({"a": a, "b": b})) == len(a)


# -- one process of several ----------------------------------------------------------------------------------

SHARE = "the data are one of 2 shares .number 1, by a DistributedSampler., and are taken for all there are"


def share(rank, shares=2):
    """What one process gets; each example once."""
    dataset = TensorDataset(X, Y)
    return DataLoader(dataset, 2, sampler=DistributedSampler(dataset, shares, rank, shuffle=False))


def test_a_share_of_the_data_is_not_taken_for_all_in_silence():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    posterior = kl.KronLaplace(model, "classification").fit([(X, Y)])
    uses = {
        "fisher": lambda data: kl.estimate_fisher(model, data, "classification"),
        "fit": lambda data: kl.KronLaplace(model, "classification").fit(data),
        "validation": lambda data: posterior.tune("validation", data=data, grid=[1.0]),
        "training": lambda data: kl.train_by_evidence(model, data, "classification", epochs=1),
    }
    for name, use in uses.items():
        with pytest.warns(UserWarning, match=SHARE) as caught:
            use(share(1))
        assert {w.filename for w in caught} == {__file__}, name
        use(share(0, shares=1))  # all of it


@pytest.mark.filterwarnings("ignore:the data are one of 2 shares")
def test_shares_add_up():
    """The way out that the warning names."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    fishers = [fisher_of(model, share(rank)) for rank in (0, 1)]
    posterior = kl.KronLaplace(model, "classification", "tkfac")
    for fisher in fishers:
        posterior.fit(fisher=fisher, add=True)
    assert_same(posterior.fisher, fisher_of(model, [(X, Y)]))


def test_shares_of_accelerate():
    """Its loaders have a batch sampler that says how many processes there are."""

    class BatchSamplerShard:
        num_processes, process_index = 2, 1

        def __iter__(self):
            yield [1, 3]

    model = OneTensor()
    with pytest.warns(UserWarning, match="the data are one of 2 shares .number 1, by a BatchSamplerShard"):
        fisher_of(model, DataLoader(TensorDataset(X, Y), batch_sampler=BatchSamplerShard()))
