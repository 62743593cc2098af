"""The sample of training examples that a fit keeps."""

import pytest
import torch

from kronlaplace.data import kept_examples
from kronlaplace.data.inputs import Inputs
from kronlaplace.data.kept_examples import KeptExamples


def numbers(kept):
    """The examples' own numbers, which the targets are; the inputs must be theirs."""
    found = []
    for inputs, targets in kept.batches():
        assert torch.equal(inputs.value[:, 0], targets.float())
        found += targets.tolist()
    return found


def sample(n, seed, size=50, start=0):
    kept = KeptExamples(seed)
    for part in torch.arange(start, start + n).split(size):
        kept.add(Inputs(part.float().unsqueeze(1).repeat(1, 3)), part)
    return kept


def test_few_examples_are_all_kept():
    assert sorted(numbers(sample(130, seed=0))) == list(range(130))


@pytest.mark.parametrize("size", [1, 7, 5000])
def test_many_are_a_sample_without_replacement(size, monkeypatch):
    monkeypatch.setattr(kept_examples, "_COUNT", 64)
    found = numbers(sample(1000, seed=0, size=size))
    assert len(found) == len(set(found)) == 64
    assert found != numbers(sample(1000, seed=1, size=size))


def test_every_example_is_kept_equally_often(monkeypatch):
    """Each of 100 examples is among 64 with probability 0.64: 5 standard errors of 600 samples."""
    monkeypatch.setattr(kept_examples, "_COUNT", 64)
    counts = torch.zeros(100)
    for seed in range(600):
        counts[numbers(sample(100, seed, size=30))] += 1
    assert (counts / 600 - 0.64).abs().max() < 5 * (0.64 * 0.36 / 600) ** 0.5


def test_the_limit_of_memory_leaves_at_least_64(monkeypatch):
    monkeypatch.setattr(kept_examples, "_BYTES", 20 * 90)  # an example has 12 bytes of inputs and 8 of its target
    assert len(sample(300, seed=0)) == 90
    monkeypatch.setattr(kept_examples, "_BYTES", 20)
    assert len(sample(300, seed=0)) == 64


def test_the_global_random_state_stays():
    before = torch.get_rng_state()
    sample(100, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_may_be_overwritten():
    kept = KeptExamples()
    x, y = torch.arange(5.0).unsqueeze(1), torch.arange(5)
    kept.add(Inputs(x), y)
    x.fill_(9)
    y.fill_(9)
    assert sorted(numbers(kept)) == [0, 1, 2, 3, 4]


def test_merging_samples_both(monkeypatch):
    monkeypatch.setattr(kept_examples, "_COUNT", 80)
    kept = sample(100, seed=0)
    kept.merge(sample(100, seed=1, start=100))
    found = numbers(kept)
    assert len(set(found)) == len(found) == 80
    assert 20 < sum(n >= 100 for n in found) < 60


def test_fewer_of_them_are_a_sample_too():
    kept = sample(100, seed=0)
    fewer = numbers(kept.at_most(30))
    assert len(fewer) == 30 and set(fewer) < set(range(100)) and fewer != list(range(30))
    assert numbers(kept.at_most(200)) == numbers(kept)


def test_inputs_of_several_shapes_and_shared_tensors():
    """Batches of one shape are joined; a tensor that all examples share is not cut, and its batches stay apart."""
    kept = KeptExamples()
    for length in (3, 5, 3):
        kept.add(Inputs({"tokens": torch.full((2, length), length)}), torch.full((2,), length))
    assert sorted(tuple(inputs.value["tokens"].shape) for inputs, _ in kept.batches()) == [(2, 5), (4, 3)]
    shared = KeptExamples()
    for _ in range(2):
        shared.add(Inputs((torch.ones(4, 3), torch.ones(7))), torch.ones(4), shared=("1",))
    assert [tuple(t.shape for t in inputs.value) for inputs, _ in shared.batches()] == [((4, 3), (7,))] * 2


def test_examples_on_another_axis():
    kept = KeptExamples()
    kept.add(Inputs(torch.arange(12.0).view(3, 4)), torch.arange(4), axis=1)
    ((inputs, targets),) = kept.batches()
    assert torch.equal(inputs.value, torch.arange(12.0).view(3, 4)[:, targets])


def test_moving_changes_the_dtype_of_numbers_only():
    kept = KeptExamples()
    kept.add(Inputs((torch.ones(2, 1), torch.ones(2, dtype=torch.int64))), torch.ones(2))
    ((inputs, targets),) = kept.to(torch.device("cpu"), torch.float64).batches()
    assert [t.dtype for t in inputs.value] == [torch.float64, torch.int64] and targets.dtype == torch.float32
