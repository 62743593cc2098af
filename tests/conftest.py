import itertools

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("tests.support")
settings.register_profile("grid", deadline=None, max_examples=15, derandomize=True)
settings.register_profile("quick", settings.get_profile("grid"), max_examples=5)


def pytest_configure(config):
    settings.load_profile("quick" if "not grid" in config.option.markexpr else "grid")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items):
    """Mark with ``grid`` what is not in the quick tier, and with ``slow`` what is not in the grid either."""
    from tests.support import tiers  # behind `register_assert_rewrite`

    for test, group in itertools.groupby(items, key=lambda item: item.nodeid.partition("[")[0]):
        cases = list(group)
        if not hasattr(cases[0], "callspec"):
            continue
        values = [tiers.values(case) for case in cases]
        quick = cases[0].get_closest_marker("quick")
        most = quick.args[0] if quick else tiers.CASES if len(values[0]) > 1 else len(cases)
        in_grid = set(tiers.choose(values, test, quick.kwargs.get("grid") if quick else None))
        chosen = set(tiers.choose(values, test, most))
        for i, case in enumerate(cases):
            if i not in chosen:
                case.add_marker("grid" if i in in_grid else "slow")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the suite runs in several processes


@pytest.fixture
def same_threads():
    """Leave the number of threads as it is, which programs set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
