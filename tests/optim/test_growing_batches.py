"""Growing batches against the schedule written out, and what a sampler of batches promises."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kronlaplace.optim.growing_batches import GrowingBatches


def test_sizes_are_the_papers():
    n, batches = 50_000, GrowingBatches(range(50_000), 600)
    b = 499 / math.log(n / 1000)  # from m_500 = n
    assert [batches.size(k) for k in range(1, 601)] == [
        round(min(1000 * math.exp((k - 1) / b), n)) for k in range(1, 601)
    ]
    assert batches.size(1) == 1000
    assert batches.size(499) < n == batches.size(500)


def test_no_example_comes_twice_in_a_pass():
    n, batches = 100, GrowingBatches(range(100), 60, first=7, full_at=50)
    seen, passes = [], 0
    for batch in batches:
        if len(seen) + len(batch) > n:
            assert n - len(seen) < len(batch)
            seen, passes = [], passes + 1
        seen += batch
        assert len(set(seen)) == len(seen) <= n
        assert set(seen) <= set(range(n))
    assert passes > 10


def test_passes_are_shuffled_by_the_seed():
    first, again, other = (list(GrowingBatches(range(30), 9, first=30, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(map(tuple, first))) == 9
    assert all(sorted(batch) == list(range(30)) for batch in first)


@pytest.mark.parametrize("at", [0, 1, 13, 29, 30])
def test_it_resumes_at_the_batch(at):
    complete = list(GrowingBatches(range(100), 30, first=7, full_at=20, seed=3))
    batches = GrowingBatches(range(100), 30, first=7, full_at=20, seed=3)
    begun = [batch for _, batch in zip(range(at), batches, strict=False)]
    resumed = GrowingBatches(range(100), 30, first=7, full_at=20, seed=3)
    resumed.load_state_dict(batches.state_dict())
    assert len(resumed) == 30 - at
    assert begun + list(resumed) == complete
    assert len(resumed) == 0
    with pytest.raises(ValueError, match="first is 7, here first is 8"):
        GrowingBatches(range(100), 30, first=8, full_at=20, seed=3).load_state_dict(batches.state_dict())


def test_in_a_loader():
    data = TensorDataset(torch.arange(40.0))
    batches = GrowingBatches(data, 10, first=4, full_at=5)
    loader = DataLoader(data, batch_sampler=batches)
    assert len(loader) == 10
    sizes = [len(x) for (x,) in loader]
    assert sizes == [batches.size(k) for k in range(1, 11)]
    assert sizes[0] == 4
    assert sizes[4:] == [40] * 6


def test_data_smaller_than_the_first_batch():
    assert list(map(len, GrowingBatches(range(5), 3))) == [5, 5, 5]


def test_arguments_out_of_range():
    for options in ({"n_batches": 0}, {"first": 0}, {"full_at": 1}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            GrowingBatches(range(5), **{"n_batches": 3, **options})
    with pytest.raises(ValueError, match="empty"):
        GrowingBatches([], 3)
