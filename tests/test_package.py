"""What users of the installed package rely on."""

import ast
import graphlib
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
    for module in (kl.damping, kl.metrics, kl.laplace, kl.priors, kl.likelihoods, kl.estimators):
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
assert not {'matplotlib', 'avalanche'} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def imports_of(path):
    """The modules of the package that a file imports, by their dotted names without the package's."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kronlaplace":
            base = node.module.partition(".")[2]
            for alias in node.names:
                name = f"{base}.{alias.name}" if base else alias.name
                file = Path(kl.__file__).parent / name.replace(".", "/")
                yield name if file.is_dir() or file.with_suffix(".py").is_file() else base


def test_consumers_do_not_import_one_another_and_parts_look_down_only():
    """The data flows one way: no part of the package imports one above it."""
    order = [
        "_arguments",
        "_dense",
        "_registry",
        "_log",
        "_precision",
        "_storage",
        "_memory_layout",
        "_wrappers",
        "_replica",
        "_scores",
        "metrics",
        "data",
        "likelihoods",
        "blocks",
        "damping",
        "layers",
        "estimators",
        "network",
        "fisher",
        "priors",
        "testing",
        "extensions",
        "optim",
        "laplace",
        "continual",  # only its posterior is a KronLaplace, imported where it is made
        "integrations",
        "demo",
        "cli",
    ]
    package = Path(kl.__file__).parent
    for path in package.rglob("*.py"):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        if part.startswith("__"):
            continue
        for imported in filter(None, imports_of(path)):
            lower = imported.partition(".")[0]
            assert order.index(lower) <= order.index(part), f"{path} imports kronlaplace.{imported}"


def test_modules_import_one_another_in_no_circle():
    package = Path(kl.__file__).parent
    graph = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        graph[".".join(part for part in parts if part != "__init__")] = set(filter(None, imports_of(path)))
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises at a circle


def test_no_module_is_too_long_to_read():
    """Those that are longer are listed with the reason."""
    longer = {
        "laplace/posterior.py",  # the docstrings of the public class
        "network/observer.py",  # forward and backward hooks of one object
        "likelihoods/base.py",  # the contract of likelihoods with its docstrings
    }
    package = Path(kl.__file__).parent
    found = {str(p.relative_to(package)) for p in package.rglob("*.py") if len(p.read_text().splitlines()) > 400}
    assert found <= longer


def test_no_test_module_imports_another():
    """What tests share is in `tests.support`, where a change breaks nothing by surprise."""
    for path in (ROOT / "tests").rglob("*.py"):
        imported = re.search(r"^\s*(?:from|import) [\w., ]*\btest_\w+", path.read_text(), re.MULTILINE)
        assert not imported, f"{path}: {imported[0].strip()}"
