"""Which axis of the outputs the classes are on: told by shapes, by targets, or asked for."""

import pytest
import torch

import kronlaplace as kl
from kronlaplace.likelihoods import Euclidean, HeteroscedasticGaussian, Sampling
from tests.support.likelihoods import draw


@pytest.mark.parametrize(
    ("outputs", "targets", "axis"),
    [
        ((5, 4), (5,), 1),
        ((5, 4, 2), (5, 2), 1),
        ((5, 4, 2), (5, 4), 2),
        ((5, 4, 1), (5, 1), 1),
        ((5, 1, 4), (5, 1), 2),
        ((5, 4, 2, 3), (5, 2, 3), 1),
        ((5, 4, 2, 3), (5, 4, 2), 3),
        ((5, 4, 2, 3), None, 1),
        ((5, 4, 2, 3, 2), None, 1),
        ((5, 4), None, 1),
    ],
)
def test_class_axis_is_inferred_where_shapes_tell(outputs, targets, axis):
    f = torch.randn(outputs).double()
    y = None if targets is None else torch.zeros(targets, dtype=torch.long)
    likelihood = kl.Categorical()
    likelihood.check_outputs(f)
    if y is None:
        torch.testing.assert_close(likelihood.sample_mean(f), f.softmax(axis))
    else:
        assert likelihood.check_targets(f, y)[0]
        (direction,) = likelihood.directions(f, Sampling.EMPIRICAL, targets=y)
        torch.testing.assert_close(direction.argmin(axis), y)
    for sampling in Sampling:
        if y is not None or sampling is not Sampling.EMPIRICAL:
            for d in likelihood.directions(f, sampling, targets=y):
                torch.testing.assert_close(d.sum(axis), torch.zeros(d.sum(axis).shape).double())


@pytest.mark.parametrize("sampling", Sampling)
@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        ((5, 4, 4), (5, 4), r"targets of shape \(5, 4\) fit both"),
        ((5, 2, 2, 2), (5, 2, 2), r"targets of shape \(5, 2, 2\) fit both"),
        ((5, 4, 2), None, "there are no targets to infer it from"),
    ],
)
def test_ambiguous_class_axis(outputs, targets, message, sampling):
    message = (
        rf"Categorical cannot determine.*{message}.*kl\.Categorical\(class_axis=1\).*kl\.Categorical\(class_axis=-1\)"
    )
    f, likelihood = torch.randn(outputs), kl.Categorical()
    likelihood.check_outputs(f)
    if targets is None and sampling is Sampling.EMPIRICAL:
        message = "none were given"
    y = None if targets is None else torch.zeros(targets, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        list(likelihood.directions(f, sampling, targets=y))
    if sampling is Sampling.EXACT:
        with pytest.raises(ValueError, match=message):
            likelihood.n_directions(f, sampling, 1, y)
    if y is not None:
        with pytest.raises(ValueError, match=message):
            likelihood.check_targets(f, y)
        with pytest.raises(ValueError, match=message):
            likelihood.statistics(f, y)


OTHERS = [kl.Bernoulli(), kl.Gaussian(), Euclidean(), HeteroscedasticGaussian()]


@pytest.mark.parametrize(
    ("class_axis", "outputs", "axis"),
    [
        (None, (5, 4), 1),
        (1, (5, 4), 1),
        (-1, (5, 4), 1),
        (None, (5, 4, 2, 3), 1),
        (1, (5, 4, 2), 1),
        (1, (5, 2, 2, 4), 1),
        (-1, (5, 4, 2), 2),
        (2, (5, 4, 2), 2),
        (-1, (5, 4, 2, 3), 3),
        (3, (5, 4, 2, 3), 3),
        (4, (5, 4, 2, 3, 2), 4),
    ],
)
def test_class_axis_of_outputs(class_axis, outputs, axis):
    """And the probabilities sum to one over it."""
    likelihood, f = kl.Categorical(class_axis=class_axis), torch.randn(outputs).double()
    assert likelihood.class_axis_of(f) == likelihood.class_axis_of(f.to("meta")) == axis
    torch.testing.assert_close(likelihood.sample_mean(f), f.softmax(axis))


@pytest.mark.parametrize("likelihood", OTHERS, ids=str)
def test_outputs_of_other_likelihoods_have_no_class_axis(likelihood):
    assert likelihood.class_axis_of(torch.zeros(5, 4)) is None
    assert likelihood.class_axis_of(torch.zeros(5)) is None


@pytest.mark.parametrize(
    ("class_axis", "outputs", "message"),
    [
        (None, (5, 4, 2), "cannot determine.*there are no targets to infer it from"),
        (None, (5,), r"needs one logit per class.*returned \(5,\)"),
        (1, (5, 1, 2), "needs one logit per class"),
        (2, (5, 4), "class_axis=2 is not the last axis"),
        (2, (5, 4, 2, 3), "class_axis=2 is not the last axis"),
    ],
)
def test_class_axis_of_outputs_that_do_not_tell(class_axis, outputs, message):
    with pytest.raises(ValueError, match=message):
        kl.Categorical(class_axis=class_axis).class_axis_of(torch.zeros(outputs))


@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 4, 4), (3, 2, 3, 4)])
@pytest.mark.parametrize("sampling", Sampling)
def test_last_axis_by_its_number(shape, sampling):
    f, y = draw("tokens", shape)
    by_number, expected = kl.Categorical(class_axis=len(shape) - 1), kl.Categorical(class_axis=-1)
    assert by_number.check_targets(f, y)[0]
    assert torch.equal(by_number.statistics(f, y), expected.statistics(f, y))
    options = {"mc_samples": 2, "targets": y}
    ours, reference = (
        list(likelihood.directions(f, sampling, generator=torch.Generator().manual_seed(0), **options))
        for likelihood in (by_number, expected)
    )
    torch.testing.assert_close(ours, reference, rtol=0, atol=0)


@pytest.mark.parametrize("sampling", [Sampling.EXACT, Sampling.EMPIRICAL])
def test_axis_that_is_not_last_is_refused_wherever_it_is_used(sampling):
    likelihood, f, y = kl.Categorical(class_axis=2), torch.zeros(3, 2, 4, 2), torch.zeros(3, 2, 2, dtype=torch.long)
    for use in (
        lambda: likelihood.check_targets(f, y),
        lambda: likelihood.statistics(f, y),
        lambda: list(likelihood.directions(f, sampling, targets=y)),
        lambda: likelihood.sample_mean(f),
        lambda: likelihood.predictive_nll(f, y),
    ):
        with pytest.raises(ValueError, match="class_axis=2 is not the last axis"):
            use()


@pytest.mark.parametrize(
    ("outputs", "targets", "axis"),
    [
        ((5, 4), (5,), None),
        ((5, 4), None, None),
        ((5, 4, 2), (5, 2), 1),
        ((5, 4, 2), (5, 4), -1),
        ((5, 1, 4), (5, 1), -1),
        ((5, 4, 2), None, None),
        ((5, 4, 2, 3), (5, 2, 3), 1),
        ((5, 4, 2, 3), (5, 4, 2), -1),
        ((5, 4, 2, 3), None, 1),
    ],
)
def test_targets_teach_the_class_axis(outputs, targets, axis):
    f, y = torch.randn(outputs), None if targets is None else torch.zeros(targets, dtype=torch.long)
    informed = kl.Categorical(ignore_index=7).informed_by(f, y)
    assert informed == kl.Categorical(ignore_index=7, class_axis=axis)
    assert informed.informed_by(f, y) is informed
    if len(outputs) == 2 or axis is not None:  # now it needs no targets
        assert informed.class_axis_of(f) == (len(outputs) - 1 if axis == -1 else 1)


@pytest.mark.parametrize("targets", [(5, 4), (5, 4, 4)])
def test_targets_that_fit_both_axes_or_none_teach_nothing(targets):
    f, y = torch.randn(5, 4, 4), torch.zeros(targets, dtype=torch.long)
    with pytest.raises(ValueError) as refused:
        kl.Categorical().check_targets(f, y)
    with pytest.raises(ValueError) as taught:
        kl.Categorical().informed_by(f, y)
    assert str(taught.value) == str(refused.value)


@pytest.mark.parametrize("likelihood", [*OTHERS, *(kl.Categorical(class_axis=axis) for axis in (1, -1, 2))], ids=str)
@pytest.mark.parametrize("with_targets", [True, False])
def test_others_have_nothing_to_learn(likelihood, with_targets):
    assert likelihood.informed_by(torch.zeros(5, 4, 2), torch.zeros(5, 4, 2) if with_targets else None) is likelihood


class Moved(torch.nn.Module):
    """Classes of tokens, ``(N, T, C)``, on another axis."""

    def __init__(self, axis):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.axis = torch.nn.Linear(3, 4), axis

    def forward(self, x):
        return self.linear(x).movedim(-1, self.axis)


def batches(*positions):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, *shape, 3, generator=generator), torch.randint(4, (5, *shape), generator=generator))
        for shape in positions
    ]


@pytest.mark.parametrize("estimator", ["kfac", "kfoc"])
@pytest.mark.parametrize(
    ("axis", "positions", "taught"),
    [(1, [(2,), (2,)], 1), (-1, [(2,), (2,)], -1), (1, [(2, 3)], 1), (-1, [(2, 3)], -1), (-1, [(), ()], None)],
)
def test_a_fisher_knows_the_class_axis(axis, positions, taught, estimator, tmp_path):
    model, data = Moved(axis).eval(), batches(*positions)
    fisher = kl.estimate_fisher(model, data, kl.Categorical(ignore_index=9), estimator, sampling="exact")
    assert fisher.metadata.likelihood == kl.Categorical(ignore_index=9, class_axis=taught)
    fisher.save(tmp_path / "fisher.safetensors")
    restored = kl.KroneckerFisher.load(tmp_path / "fisher.safetensors")
    assert restored.metadata.likelihood == fisher.metadata.likelihood


def test_the_first_batch_tells_the_class_axis_for_those_that_fit_both():
    """As a sequence as long as there are classes does."""
    model, data = Moved(-1).eval(), batches((2,), (4,))
    fisher = kl.estimate_fisher(model, data, "classification", sampling="exact")
    expected = kl.estimate_fisher(model, data, kl.Categorical(class_axis=-1), sampling="exact")
    torch.testing.assert_close(fisher["linear"].to_dense(), expected["linear"].to_dense(), rtol=0, atol=0)
    assert fisher.metadata.likelihood == expected.metadata.likelihood
    with pytest.raises(ValueError, match="batch 0: Categorical cannot determine"):
        kl.estimate_fisher(model, data[::-1], "classification", sampling="exact")


@pytest.mark.parametrize("likelihood", [kl.Bernoulli(), kl.Gaussian(noise_std=0.5), Euclidean()], ids=str)
def test_a_fisher_leaves_other_likelihoods_alone(likelihood):
    data = [(x, torch.zeros(5, 2, 4)) for x, _ in batches((2,))]
    fisher = kl.estimate_fisher(Moved(-1).eval(), data, likelihood)
    assert fisher.metadata.likelihood is likelihood
