"""What users of the installed package rely on."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kronlaplace as kl

ROOT = Path(__file__).parent.parent


def test_public_names_are_there():
    for name in kl.__all__:
        assert getattr(kl, name) is not None


def test_only_public_names_are_listed():
    """What completion shows: no imports, no modules of the inside."""
    assert dir(kl) == sorted([*kl.__all__, "__version__"])
    for module in (kl.damping, kl.metrics, kl.laplace, kl.likelihoods, kl.estimators):
        assert dir(module) == sorted(module.__all__)


def test_package_is_typed():
    assert (Path(kl.__file__).parent / "py.typed").is_file()


def test_versions_agree():
    """pyproject, package, citation and changelog name the same version."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert kl.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.grid
def test_importing_changes_nothing():
    """No output, no change of random state, threads, gradient mode, warnings or hooks; matplotlib is not needed."""
    program = """
import sys, warnings, torch, backpack, scipy.optimize, scipy.special  # SciPy adds filters of its own
state, threads, filters = torch.get_rng_state(), torch.get_num_threads(), list(warnings.filters)
import kronlaplace
assert torch.equal(torch.get_rng_state(), state)
assert torch.get_num_threads() == threads and torch.is_grad_enabled()
assert warnings.filters == filters
assert 'matplotlib' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_consumers_do_not_import_one_another_and_rooms_look_down_only():
    """The data flows one way: no room imports one above it."""
    order = [
        "options",
        "precision",
        "memory_layout",
        "fingerprint",
        "linalg",
        "serialization",
        "forward_errors",
        "links",
        "likelihoods",
        "alignment",
        "batches",
        "memory_layout",
        "layers",
        "replica",
        "example_axes",
        "last_layer",
        "output_activation",
        "collect",
        "layer_checks",
        "blocks",
        "coverage",
        "kronecker",
        "inversion",
        "damping",
        "estimators",
        "combination",
        "accumulation",
        "fisher",
        "error",
        "laplace",
        "integrations",
        "metrics",
        "demo",
        "cli",
    ]
    package = Path(kl.__file__).parent
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        for imported in re.findall(r"^(?:from|import) kronlaplace\.?(\w*)", path.read_text(), re.MULTILINE):
            if imported:
                assert order.index(imported) <= order.index(room), f"{path} imports kronlaplace.{imported}"


def test_no_test_module_imports_another():
    """What tests share is in `tests.support`, where a change breaks nothing by surprise."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            where = (getattr(node, "module", None) or "").split(".")
            parts = [part for name in names for part in (*where, *name.split("."))]
            assert not any(part.startswith("test_") for part in parts), f"{path} imports a test module"
