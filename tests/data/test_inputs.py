"""What a batch may look like, and which axis its examples are on: right or refused, with a message that helps."""

import collections
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

import kronlaplace as kl
from tests.support.assertions import assert_close
from tests.support.inputs import Joined, OneArgument, OneTensor, Options, Positional, WithLogits, assert_same, fisher_of

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


@pytest.mark.grid
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


# -- batches of other forms ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    a: torch.Tensor
    b: torch.Tensor
    labels: torch.Tensor | None = None

    def __getitem__(self, name):
        return getattr(self, name)


@dataclasses.dataclass(slots=True)
class Slots:
    a: torch.Tensor
    b: torch.Tensor
    labels: torch.Tensor | None = None

    def __getitem__(self, name):
        return getattr(self, name)


class Encoding(collections.UserDict):
    """As the ``BatchEncoding`` of transformers: a mapping that is no dict, with a method `to`."""

    def to(self, device):
        return Encoding({key: value.to(device) for key, value in self.data.items()})


class Moving(OneArgument):
    """Moves its inputs itself."""

    def forward(self, batch):
        return super().forward(batch.to("cpu"))


@pytest.mark.parametrize("kind", [Record, Slots])
def test_a_dataclass_is_one_input(kind):
    model, expected, data = joined(OneArgument)
    assert_same(fisher_of(model, [(kind(a, b), y) for a, b, y in data]), expected)
    assert_same(fisher_of(model, [kind(a, b, y) for a, b, y in data]), expected)
    posterior = kl.KronLaplace(model, "classification", "tkfac").fit([kind(a, b, y) for a, b, y in data])
    a, b, y = data[0]
    torch.testing.assert_close(posterior.predict(kind(a, b)), posterior.predict({"a": a, "b": b}))
    torch.testing.assert_close(posterior.predict([kind(a, b, y)]), posterior.predict({"a": a, "b": b}))
    with pytest.raises(ValueError, match="the inputs contain NaN or infinite values"):
        posterior.predict(kind(a / 0, b))


def test_a_mapping_of_another_class_keeps_it():
    model, expected, data = joined(Moving)
    assert_same(fisher_of(model, [(Encoding(a=a, b=b), y) for a, b, y in data]), expected)
    batches = [Encoding(a=a, b=b, labels=y) for a, b, y in data]
    assert_same(fisher_of(model, batches), expected)
    assert all(set(batch) == {"a", "b", "labels"} for batch in batches)  # as they were


def test_a_function_of_each_batch():
    """In several passes, over a shuffling loader, which is rewound."""
    x, y = torch.randn(5, 5).double(), torch.randint(3, (5,))
    loader = DataLoader(TensorDataset(x[:, :2], x[:, 2:], y), batch_size=2, shuffle=True)
    model, twin = Positional(), OneTensor()
    twin.load_state_dict(model.state_dict())
    data = kl.ConvertedLoader(loader, lambda batch: ((batch[0], batch[1]), batch[2]))
    assert len(data) == len(loader) and data.dataset is loader.dataset
    for estimator in ("tkfac", "ekfac"):
        assert_same(fisher_of(model, data, estimator), fisher_of(twin, [(x, y)], estimator), 1e-9)
    posterior = kl.KronLaplace(model, "classification").fit(data)
    assert posterior.predict(data).shape == (5, 3)
    with pytest.warns(UserWarning, match="the data are one of 2 shares"):
        fisher_of(OneTensor(), kl.ConvertedLoader(share(1), lambda batch: tuple(batch)))


class Graphs:
    """As torch_geometric's ``Batch``: the nodes of all graphs one after the other, and the graph of each."""

    def __init__(self, sizes):
        self.batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        self.x, self.y = torch.randn(sum(sizes), 5).double(), torch.arange(len(sizes)) % 3


class GraphNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.node, self.head = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x, batch):
        sums = x.new_zeros(int(batch.max()) + 1, 4).index_add(0, batch, torch.tanh(self.node(x)))
        return self.head(sums)


def test_graphs_are_refused():
    """An example is a graph, and a layer has as many rows as there are nodes."""
    model, data = GraphNetwork(), [Graphs([2, 3, 1])]
    with pytest.raises(TypeError, match=r"batch 0: expected a pair.* got Graphs\..*kl\.ConvertedLoader"):
        fisher_of(model, data)
    with pytest.raises(ValueError, match="the model must return one row of outputs per example; for inputs of shape"):
        fisher_of(model, kl.ConvertedLoader(data, lambda graphs: ((graphs.x, graphs.batch), graphs.y)))


@pytest.mark.parametrize("loader", [iter([1]), 3])
def test_what_cannot_be_converted(loader):
    with pytest.raises(TypeError, match=r"loader must be a loader that can be read again and again.*got"):
        kl.ConvertedLoader(loader, len)
    with pytest.raises(TypeError, match="convert must be a function of a batch, got 1"):
        kl.ConvertedLoader([], 1)


# -- refusals, as a newcomer reads them ----------------------------------------------------------------------

X, Y = torch.randn(4, 5).double(), torch.randint(3, (4,))


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return X[i], Y[i]


WRAP = r"Wrap a single batch in a list, \[\(inputs, targets\)\], and a Dataset in a DataLoader"
BATCH = r"batch 0: expected a pair \(inputs, targets\), a tensor of inputs, or a mapping; got "
REFUSED = {
    "a tensor": (X, TypeError, rf"data must be an iterable of .* batches.*; got Tensor. {WRAP}"),
    "a pair": ((X, Y), TypeError, rf"got tuple. {WRAP}"),
    "a mapping": ({"x": X}, TypeError, rf"got dict. {WRAP}"),
    "a dataset": (Images(), TypeError, rf"got Images. {WRAP}"),
    "nothing": (None, TypeError, rf"got NoneType. {WRAP}"),
    "no batch": ([], ValueError, "the data is empty: the loader yielded no batches"),
    "three tensors": (
        [(X, X, Y)],
        TypeError,
        BATCH + r"tuple of 3: Tensor, Tensor, Tensor.*pass several inputs as \(\(x1, x2\), targets\)",
    ),
    "arrays": (
        [(np.zeros((4, 5)), Y)],
        TypeError,
        BATCH + "tuple of 2: ndarray, Tensor. Convert arrays to tensors with",
    ),
    "targets in an array": ([(X, np.zeros(4))], TypeError, BATCH + "tuple of 2: Tensor, ndarray. Convert arrays to"),
    "targets in a list": ([(X, [0, 1, 2, 0])], TypeError, BATCH + "tuple of 2: Tensor, list"),
    "text": (["ab"], TypeError, BATCH + "str"),
    "a mapping of text": ([{"a": "b"}], TypeError, BATCH + "dict"),
    "a mapping of targets alone": ([{"labels": Y}], TypeError, BATCH + "dict"),
    "two keys for targets": (
        [{"x": X, "y": Y, "labels": Y}],
        TypeError,
        r"batch 0: any of \['labels', 'y'\] could be the targets",
    ),
    "no example": ([(X[:0], Y[:0])], ValueError, r"batch 0: the batch has no examples \(inputs of shape \(0, 5\)\)"),
    "targets of some": ([(X, Y), (X,)], ValueError, "batch 1: either every batch must have targets or none"),
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

SHARE = "the data are one of 2 shares .number 1, from a DistributedSampler. but are treated as the whole data set"


def share(rank, shares=2):
    """What one process gets; each example once."""
    dataset = TensorDataset(X, Y)
    return DataLoader(dataset, 2, sampler=DistributedSampler(dataset, shares, rank, shuffle=False))


@pytest.mark.grid
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
    with pytest.warns(UserWarning, match="the data are one of 2 shares .number 1, from a BatchSamplerShard"):
        fisher_of(model, DataLoader(TensorDataset(X, Y), batch_sampler=BatchSamplerShard()))
