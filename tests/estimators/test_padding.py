"""Padded text: which blocks stay the same when sentences are padded to a longer length."""

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support.assertions import assert_close
from tests.support.padded import Reader, batch


def moved(estimator):
    short, long = (
        kl.estimate_fisher(Reader(), [batch(length)], "classification", estimator, layers=["value"], sampling="exact")
        for length in (4, 9)
    )
    return short["value"].to_dense(), long["value"].to_dense()


@pytest.mark.parametrize(
    "estimator",
    [kl.TKFAC(), kl.KFOC(), kl.KFOC(aggregation="running"), kl.Diagonal(), kl.ExactBlock()],
    ids=["tkfac", "kfoc", "kfoc running", "diagonal", "exact"],
)
def test_padding_does_not_count(estimator):
    """No gradient reaches the padded tokens, and their inputs are weighted with it."""
    short, long = moved(estimator)
    assert_close(long, short, 1e-8)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("basis", [None, kl.EKFAC], ids=["kfac", "ekfac"])
def test_padding_does_not_count_in_kfac(sharing, basis):
    """Where the mask says which tokens are padded."""
    estimator = kl.KFAC(weight_sharing=sharing)
    short, long = moved(estimator if basis is None else basis(estimator))
    assert_close(long, short, 1e-8)


def factors(model, data, **options):
    return kl.estimate_fisher(model, data, "classification", "kfac", sampling="exact", **options)


def test_kfac_of_unpadded_tokens():
    """By the definition, example by example, each with its own number of tokens."""
    model, data = Reader(), batch(6)
    fisher = factors(model, [data])["value"]
    alone = []
    for n in range(5):
        size = int(data["attention_mask"][n].sum())
        one = {key: value[n : n + 1, :size] if value.ndim > 1 else value[n : n + 1] for key, value in data.items()}
        alone.append(factors(model, [one])["value"])
    for name in ("activation_factor", "gradient_factor"):
        assert_close(getattr(fisher, name), torch.stack([getattr(block, name) for block in alone]).mean(0), 1e-10)


def test_a_mask_of_ones_changes_nothing():
    model, data = Reader(), batch(6)
    data["attention_mask"] = torch.ones_like(data["attention_mask"])
    with_mask = factors(model, [data])
    data["attention_mask"] = data["attention_mask"].double()  # not taken for a mask of tokens
    without = factors(model, [data])
    for name in with_mask:
        assert_close(with_mask[name].to_dense(), without[name].to_dense(), 1e-10)


class Tagger(Reader):
    """Outputs at every token, padded or not."""

    def forward(self, x, attention_mask):
        return self.head(torch.tanh(self.value(x)))


@pytest.mark.parametrize("ignored", [True, False])
def test_tokens_that_the_loss_counts_are_no_padding(ignored):
    model, data = Tagger(), batch(6)
    mask = data["attention_mask"]
    data["labels"] = torch.ones_like(mask)
    if ignored:
        data["labels"][mask == 0] = -100
    model.key.requires_grad_(False)
    likelihood = kl.Categorical(class_axis=-1)
    found = kl.estimate_fisher(model, [(({k: data[k] for k in ("x", "attention_mask")}), data["labels"])], likelihood)
    a = torch.cat([data["x"], torch.ones(5, 6, 1, dtype=torch.float64)], -1)
    counts = mask if ignored else torch.ones_like(mask)
    expected = torch.einsum("nti,ntj,nt->ij", a, a, counts.double()) / 5
    assert_close(found["value"].activation_factor, expected, 1e-10)


def test_predictions_and_training_with_padded_tokens():
    data = batch(6)
    inputs = {key: data[key] for key in ("x", "attention_mask")}
    model = Reader()
    posterior = kl.KronLaplace(model, "classification").fit([data]).tune()
    assert_close(posterior.predict(inputs), posterior.predict([data]), 1e-10)
    optimizer = kl.NaturalGradient(model, "classification")
    for _ in range(2):
        optimizer.zero_grad()
        outputs = model(**inputs)
        optimizer.update_curvature(outputs)
        nn.functional.cross_entropy(outputs, data["labels"]).backward()
        optimizer.step()
