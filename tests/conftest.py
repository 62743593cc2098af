import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("tests.support")
settings.register_profile("grid", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("quick", settings.get_profile("grid"), max_examples=5)


def pytest_addoption(parser):
    parser.addoption(
        "--grid", action="store_true", help="run every case of every test, and those that take long (make test-all)"
    )


def pytest_configure(config):
    settings.load_profile("grid" if config.getoption("--grid") else "quick")


def pytest_collection_modifyitems(config, items):
    """Unless the grid or single cases are asked for, run the quick tier."""
    from tests.support.selection import quick_cases

    if config.getoption("--grid") or any("::" in argument for argument in config.args):
        return
    kept = quick_cases([item for item in items if not item.get_closest_marker("grid")])
    dropped = set(items) - set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = kept


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the suite runs in several processes
