"""Which axis the examples are on: found out for every call of every layer, or refused."""

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support import oracles
from tests.support.assertions import assert_blocks_are, assert_close
from tests.support.cases import case
from tests.support.inputs import ESTIMATORS, assert_same, fisher_of


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


def check(model, x, outputs=2, size=None, **options):
    """The blocks are what the oracles say, for each estimator."""
    made = case(model, x, outputs)
    data = oracles.gradients(made.model, made.inputs, made.likelihood)
    for name, rule in ESTIMATORS.items():
        fisher = fisher_of(made.model, made.batches(size or len(x)), name, **options)
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
        r"\(examples, \.\.\., 2\), so that each gradient belongs to one example. Keep the examples on the first axis"
    )
    with pytest.raises(NotImplementedError, match=message):
        fisher_of(made.model, [(made.inputs, made.targets)], unsupported="error")


@pytest.mark.grid
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
        check(Model(), torch.randint(5, (n, t)), unsupported="error")
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
        check(Codebook(), torch.randn(n, 2), unsupported="error")
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
