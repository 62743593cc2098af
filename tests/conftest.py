import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("tests.support")
settings.register_profile("kronlaplace", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("kronlaplace")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the suite runs in several processes
