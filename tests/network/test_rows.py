"""Networks whose rows are easily taken for something else: right blocks and predictions, or a refusal with the true reason.

In-place operations on views of a layer's output, inputs that the network changes, rows that are as many as the examples by
coincidence, inputs that all examples share, forward passes that mix examples.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from tests.support.assertions import assert_close

N = 5


class Tokens(nn.Module):
    """A linear layer or norm on tokens, something in place behind it, a head."""

    def __init__(self, layer, in_place):
        super().__init__()
        self.layer = layer
        self.in_place = in_place
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.in_place(self.layer(x)).mean(1))


def of_some(h):
    """In place on a part of a view."""
    F.elu_(h[:, :2])
    return h.tanh()


def overwritten(h):
    h[:, 0] = 0.0
    return h.tanh()


class Norm(nn.Module):
    """Instance norm of the features along the tokens; its output is a view."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, affine=True)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Doubled(nn.Module):
    """Scales its input in place."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.mul_(2.0))).mean(1))


IN_PLACE = {
    "relu": nn.ReLU(inplace=True),
    "elu": nn.ELU(inplace=True),
    "sigmoid": torch.sigmoid_,
    "scaled": lambda h: h.mul_(0.5).tanh(),
    "of some": of_some,
    "overwritten": overwritten,
    "added to": lambda h: h.add_(torch.ones_like(h)).tanh(),
}
LAYERS = {"linear": lambda: nn.Linear(4, 4), "without bias": lambda: nn.Linear(4, 4, bias=False), "instance norm": Norm}


def tokens():
    return torch.randn(N, 6, 4).double()


def jacobians(model, names, x):
    """``(N, C, P)`` by autograd, one example and output at a time, a bias is its block's last column."""
    rows = []
    for one in x:
        f = model(one[None].clone())[0]
        rows.append([torch.cat([gradient(output, model.get_submodule(name)) for name in names]) for output in f])
    return torch.stack([torch.stack(row) for row in rows])


def gradient(output, module):
    parts = torch.autograd.grad(output, list(module.parameters()), retain_graph=True)
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1).flatten()


def check_fisher_and_variance(model, names, x):
    """Blocks are the exact Gauss-Newton blocks; variances are those of the linearized model."""
    given = x.clone()
    posterior = kl.KronLaplace(model, "regression", "exact").fit(
        [(x[:2], torch.zeros(2, 3)), (x[2:], torch.zeros(N - 2, 3))]
    )
    J = jacobians(model, names, x)
    sizes = [block.shape[0] * block.shape[1] for block in posterior.fisher.values()]
    for part, block in zip(J.split(sizes, dim=2), posterior.fisher.values(), strict=True):
        assert_close(block.to_dense(), torch.einsum("ncp,ncq->pq", part, part) / N, 1e-9)
    covariance = torch.block_diag(
        *(
            torch.linalg.inv(torch.einsum("ncp,ncq->pq", part, part) + torch.eye(part.shape[2]).double())
            for part in J.split(sizes, dim=2)
        )
    )
    expected = J @ covariance @ J.mT
    for n in (1, 3, N):
        assert_close(posterior.functional_variance(x[:n]), expected[:n], 1e-9)
    assert torch.equal(x, given)


@pytest.mark.parametrize("in_place", IN_PLACE)
@pytest.mark.parametrize("layer", LAYERS)
def test_in_place_operations_behind_a_layer(layer, in_place):
    """Also where the layer's output is a view, which autograd treats in a way of its own."""
    model = Tokens(LAYERS[layer](), IN_PLACE[in_place]).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    names = ["layer.norm" if layer == "instance norm" else "layer", "head"]
    check_fisher_and_variance(model, names, tokens())


@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "kfoc", "ekfac", "diagonal"])
def test_estimators_behind_in_place_operations(estimator):
    """The same as with an activation that leaves its input alone."""
    in_place = Tokens(nn.Linear(4, 4), nn.ReLU(inplace=True)).double().eval()
    beside = Tokens(in_place.layer, nn.ReLU()).double().eval()
    beside.head = in_place.head
    data = [(tokens(), torch.arange(N) % 3)]
    found, expected = (
        kl.estimate_fisher(m, data, "classification", estimator, sampling="exact") for m in (in_place, beside)
    )
    for name in expected:
        assert_close(found[name].to_dense(), expected[name].to_dense(), 1e-10, name)


def test_a_network_that_changes_its_input():
    check_fisher_and_variance(Doubled().double().eval(), ["body", "head"], tokens())


class Selected(nn.Module):
    """A layer that sees the tokens that a mask selects, of all examples together."""

    def __init__(self):
        super().__init__()
        self.selected = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x, mask):
        h = torch.zeros_like(x)
        h[mask] = torch.tanh(self.selected(x[mask]))
        return self.head(h.mean(1))


class Centred(nn.Module):
    """Subtracts the mean of the batch."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.head((h - h.mean(0)).mean(1))


class Rolled(Centred):
    """Each example's outputs are another example's."""

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)).mean(1).roll(1, 0))


def masks():
    """As many masked tokens as there are examples, in all: two of the first example, none of the last."""
    mask = torch.zeros(N, 6, dtype=torch.bool)
    mask[0, 1] = mask[0, 3] = True
    mask[1:-1, 2] = True
    assert mask.sum() == N
    return mask


MIXED = {
    "as many selected tokens as examples": (Selected, lambda: (tokens(), masks()), ["selected"]),
    "the mean of the batch": (Centred, tokens, ["body"]),
    "another example's": (Rolled, tokens, ["body"]),
}


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_do_not_belong_to_the_examples_are_refused(name):
    make, inputs, bad = MIXED[name]
    model, x = make().double().eval(), inputs()
    data = [(x, torch.arange(N) % 3)]
    with pytest.raises(ValueError, match=rf"(?s)do not belong to the examples.*{bad[0]}"):
        kl.estimate_fisher(model, data, "classification", unsupported="error")
    if name != "as many selected tokens as examples":  # of which each example has its own
        with pytest.raises(ValueError, match=rf"{bad[0]}.*the forward pass mixes examples"):
            kl.estimate_fisher(model, data, "classification")
    fisher = kl.estimate_fisher(model, [(x, torch.arange(N) % 3)], "classification", unsupported="fixed")
    assert bad[0] not in fisher
    notes = {row.layer: row.note for row in fisher.coverage() if row.shape is None}
    assert "do not belong to the examples" in notes[bad[0]]


class WithTable(nn.Module):
    """Looks something up in a table that is given with the inputs, the same for all examples."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x, table):
        return self.head(torch.tanh(self.body(x) @ table.mT @ table).mean(1))


@pytest.mark.parametrize("rows", [150, N, N - 1, 3, 2])
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_an_input_that_all_examples_share(form, rows):
    """With as many rows as examples it is not cut when predictions are made in chunks."""
    model, x, table = WithTable().double().eval(), tokens(), torch.randn(rows, 4).double()

    def given(x):
        return (x, table) if form == "tuple" else {"x": x, "table": table}

    posterior = kl.KronLaplace(model, "classification").fit([(given(x), torch.arange(N) % 3)])
    one = kl.KronLaplace(model, "classification").fit(fisher=posterior.fisher)
    # More examples than a chunk has, and as many as the table has rows.
    many = torch.randn(150, 6, 4).double()
    found = posterior.predict(given(many))
    for i in (0, 1, 70, 149):
        assert_close(one.predict(given(many[i : i + 2]))[:1], found[i : i + 1], 1e-9)
    for n in (1, 2, rows, N):
        assert_close(posterior.predict(given(many[:n])), found[:n], 1e-9)
