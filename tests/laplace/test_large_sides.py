"""Posteriors with sides that are never formed, and predictions of many outputs through the features before them."""

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.blocks.basis import CoordinateBasis
from kronlaplace.damping.inverse import DiagonalInverse
from kronlaplace.laplace import calibration, linearized
from kronlaplace.laplace.output_covariance import OutputCovariance
from kronlaplace.laplace.predictor import Predictor
from tests.support.assertions import assert_close
from tests.support.cases import case
from tests.support.posteriors import assert_like_dense, outputs_and_jacobians, problem, some_mean, some_prior

KFAC = kl.KFAC(sketch=kl.Sketch(limit=2, rank=2))
KINDS = ["mlp", "cnn", "lstm", "depthwise"]


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def words(tokens=False):
    """Word embeddings, and more words to choose from than features."""
    torch.manual_seed(0)
    layers = [nn.Embedding(11, 4), *([] if tokens else [Mean()]), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 11)]
    made = case(nn.Sequential(*layers), torch.randint(11, (6, 5)), 11)
    if tokens:
        made.targets = torch.randint(11, (6, 5))
    return made


class Tied(nn.Module):
    """A table of words that also makes the outputs; at every word, or of the mean of all."""

    def __init__(self, tokens, padding=None):
        super().__init__()
        self.table, self.body = nn.Embedding(11, 4, padding_idx=padding), nn.Linear(4, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.table.weight
        self.tokens = tokens

    def forward(self, x):
        e = self.table(x)
        e = e.cumsum(1) if self.tokens else e.mean(1)
        return self.head(torch.tanh(self.body(e)))


def tied(tokens, padding=None):
    torch.manual_seed(0)
    made = case(Tied(tokens, padding), torch.randint(11, (6, 5)), 11)
    made.targets = torch.randint(11, (6, 5) if tokens else (6,))
    made.inputs[0] = made.targets[0] = 3
    made.model.table.weight.data[3] += 1
    return made


def fitted(made, estimator="kfac", **options):
    posterior = kl.KronLaplace(made.model, kl.Categorical(class_axis=-1), estimator, **options)
    return posterior.fit(made.batches(), sampling="exact")


@pytest.mark.parametrize("network", KINDS)
@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_evidence_and_covariances_are_those_of_the_dense_precision(network, structure):
    made = problem(network, "classification")
    prior, D = some_prior(made, structure)
    mean, flat = some_mean(made, "flat")
    posterior = made.fitted(KFAC, prior_precision=prior, prior_mean=mean, temperature=0.7)
    if network == "mlp":
        assert isinstance(posterior.fisher["2"].bases()[0], CoordinateBasis)
    assert_like_dense(made, posterior, D, flat, outputs_and_jacobians(network, "classification")[1])


@pytest.mark.parametrize("same", [False, True])
def test_the_posterior_as_prior_is_that_of_the_dense_blocks(same):
    """With a block in the same basis, and in another one."""
    made = problem("mlp", "classification")
    prior = made.fitted(KFAC).as_prior()
    posterior = made.posterior(KFAC if same else "kfac", prior_precision=prior).fit(made.data())
    earlier, F = (
        N * fisher.to_dense() for N, fisher in ((len(made.targets), f) for f in (prior.fisher, posterior.fisher))
    )
    precision = F + earlier + torch.eye(len(F), dtype=torch.float64)
    jacobians = outputs_and_jacobians("mlp", "classification")[1]
    expected = jacobians @ torch.linalg.inv(precision) @ jacobians.mT
    assert_close(posterior.functional_variance(made.inputs), expected, 1e-7)
    assert_close(sum(inverse.logdet() for inverse in posterior.covariance().values()), torch.logdet(precision), 1e-9)


def test_files_hold_diagonal_sides(tmp_path):
    made = words()
    posterior = fitted(made, KFAC).tune()
    posterior.save(tmp_path / "p.kl")
    again = kl.KronLaplace.load(tmp_path / "p.kl", made.model)
    assert again.estimator == KFAC
    assert_close(again.predict(made.inputs), posterior.predict(made.inputs), 1e-12)
    assert "G is diagonal" in str(again.fisher.coverage())
    single = posterior.to(torch.float32)
    assert single.predict(made.inputs).dtype == torch.float32
    made.model.double()


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("estimator", ["kfac", KFAC, "ekfac"], ids=["kfac", "large", "ekfac"])
def test_covariances_through_the_features_are_those_of_the_outputs(tokens, estimator, monkeypatch):
    made = words(tokens)
    posterior = fitted(made, estimator)
    predictor = Predictor(made.model, posterior._state)
    passes = []
    propagate = linearized.Linearized._propagated

    def counted(self, observer, f, *args, **options):
        passes.append(f[0].numel())
        return propagate(self, observer, f, *args, **options)

    monkeypatch.setattr(linearized.Linearized, "_propagated", counted)
    kinds = [w for w in OutputCovariance if w is not OutputCovariance.JOINT]
    found = [predictor.outputs_and_covariance(made.inputs, wanted)[1] for wanted in kinds]
    assert (
        sum(size in (3, 15) for size in passes) == len(kinds) - tokens
    )  # covariances between positions take all outputs
    monkeypatch.setattr(linearized, "_few_features", lambda *args: None)
    for wanted, covariance in zip(kinds, found, strict=True):
        assert_close(covariance, predictor.outputs_and_covariance(made.inputs, wanted)[1], 1e-8)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("padding", [None, 3])
def test_covariances_of_tied_weights_go_through_the_features(tokens, padding, monkeypatch):
    made = tied(tokens, padding)
    posterior = fitted(made)
    predictor = Predictor(made.model, posterior._state)
    kinds = [w for w in OutputCovariance if w is not OutputCovariance.JOINT]
    found = [predictor.outputs_and_covariance(made.inputs, wanted)[1] for wanted in kinds]
    f, factored = predictor.outputs_and_factored_covariance(made.inputs)
    v = torch.randn(f.numel() // 11, 11).double()
    products = factored.times(v)
    assert predictor.n_features(made.inputs) == 4
    monkeypatch.setattr(linearized, "_tied_features", lambda *args: None)
    assert predictor.outputs_and_factored_covariance(made.inputs) is None
    for wanted, covariance in zip(kinds, found, strict=True):
        whole = predictor.outputs_and_covariance(made.inputs, wanted)[1]
        assert_close(covariance, whole, 1e-8)
        if wanted is OutputCovariance.BY_POSITION:
            formed = whole.reshape(-1, 11, 11)
            assert_close(products, torch.einsum("ncd,nd->nc", formed, v), 1e-8)
            assert_close(factored.diagonal, formed.diagonal(dim1=1, dim2=2), 1e-8)


def test_features_that_the_network_changes_afterwards_are_not_used():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 11)

        def forward(self, x):
            h = self.body(x)
            f = self.head(h)
            h.mul_(2)
            return f

    torch.manual_seed(0)
    made = case(InPlace(), torch.randn(6, 4), 11)
    made.model.head.weight.requires_grad_(False)  # else autograd refuses the change
    posterior = kl.KronLaplace(made.model, "classification", layers=["body"]).fit(made.batches())
    assert posterior.functional_variance(made.inputs).shape == (6, 11, 11)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("estimator", ["kfac", KFAC], ids=["kfac", "large"])
@pytest.mark.parametrize("make", [words, tied])
def test_the_scale_of_the_logits_needs_no_covariances(tokens, estimator, make, monkeypatch):
    made = make(tokens)
    posterior = fitted(made, estimator)
    expected = posterior.tune().logit_scale
    monkeypatch.setattr(calibration, "_MANY", 2)
    monkeypatch.setattr(calibration, "_of_examples", _without_covariances(calibration._of_examples))
    assert posterior.tune().logit_scale == pytest.approx(expected, rel=1e-4)


def _without_covariances(function):
    def checked(predictor, x, y, factored):
        assert factored
        return function(predictor, x, y, factored)

    return checked


class TwoReadings(nn.Module):
    """Outputs of which each depends on one of two readings of the same table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 1)

    def forward(self, x):
        first, second = self.table(x[:, :2]), self.table(x[:, 2:])
        return torch.cat([first.sum(1), second.square().sum(1)], dim=1)


def test_outputs_that_read_a_table_in_different_calls():
    torch.manual_seed(0)
    made = case(TwoReadings(), torch.tensor([[0, 1, 1, 2], [3, 3, 4, 5], [6, 0, 6, 6]]), 2)
    posterior = kl.KronLaplace(made.model, "classification").fit(made.batches())
    J = torch.stack([torch.func.jacrev(_outputs(made.model, x))(made.model.table.weight.detach()) for x in made.inputs])
    S = posterior.covariance()["table"].diagonal()
    expected = torch.einsum("ncqp,ndqp,qp->ncd", J[:, 0], J[:, 0], S)
    assert_close(posterior.functional_variance(made.inputs), expected, 1e-8)


def _outputs(model, x):
    return lambda weight: torch.func.functional_call(model, {"table.weight": weight}, (x[None],))


def test_a_diagonal_block_is_inverted_without_a_copy_of_it():
    made = words()
    posterior = fitted(made)
    inverse = posterior.covariance()["0"]
    assert isinstance(inverse, DiagonalInverse)
    assert inverse.block is posterior.fisher["0"]
    expected = 6 * posterior.fisher["0"].values + 1
    assert_close(inverse.eigenvalues, expected, 1e-12)
    assert_close(inverse.logdet(), expected.log().sum(), 1e-12)
    with pytest.raises(ValueError, match="singular"):
        kl.damping.Tikhonov(0.0).invert(kl.DiagonalBlock(torch.tensor([[0.0, 1.0]])))


def test_the_evidence_is_summed_in_parts(monkeypatch):
    made = words()
    posterior = fitted(made, KFAC)
    expected = posterior.log_marginal_likelihood(0.3)
    for module in ("laplace.evidence", "priors.prior", "blocks.diagonal"):
        monkeypatch.setattr(f"kronlaplace.{module}._CHUNK", 3)
    again = fitted(made, KFAC)
    precision = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    value = again.log_marginal_likelihood(precision)
    assert_close(value.detach(), expected, 1e-12)
    (gradient,) = torch.autograd.grad(value, precision)
    step = 1e-5
    there, back = (posterior.log_marginal_likelihood(0.3 + s) for s in (step, -step))
    assert_close(gradient, (there - back) / (2 * step), 1e-6)
    assert_close(again.covariance()["0"].weights, posterior.covariance()["0"].weights, 0)
