"""The README and the documentation: their code runs as it stands there, and their links lead somewhere."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from experiments import peers
from kronlaplace.testing import temporary_registrations

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")

TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
CODE = {
    page: re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE) for page, text in TEXTS.items()
}
BLOCKS = [
    pytest.param(code, id=f"{page}-{i}") for page, blocks in CODE.items() for i, code in enumerate(blocks, start=1)
]
RUN_ELSEWHERE = {"needs-avalanche": "tests/integrations/test_avalanche.py", "example": "tests/test_examples.py"}


@pytest.fixture
def names():
    """What the pages' code may take for granted: a classifier with eight inputs and three classes, and its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)).eval()
    loader = DataLoader(TensorDataset(torch.randn(60, 8), torch.randint(3, (60,))), batch_size=20)
    tasks = [TensorDataset(torch.randn(40, 8), torch.randint(3, (40,))) for _ in range(3)]
    return {
        "__name__": "page",
        "torch": torch,
        "model": model,
        **dict.fromkeys(("train_loader", "validation_loader", "test_loader", "more_data"), loader),
        "task_loaders": [DataLoader(task, batch_size=20) for task in tasks],
        "x_test": torch.randn(8, 8),
        "device": torch.device("cpu"),
    }


@pytest.mark.quick(16)
@pytest.mark.parametrize("code", BLOCKS)
@pytest.mark.filterwarnings(
    "ignore:the validation loss is smallest at the edge",  # labels without a pattern want an endless prior precision
    "ignore:the evidence is largest at the edge",
    "ignore:Full backward hook is firing:UserWarning",  # BackPACK's
)
def test_code_runs(code, names, tmp_path, monkeypatch, capsys):
    if "from laplace" in code:
        try:
            peers.laplace_torch()
        except ImportError as error:
            pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    if "posterior" in code:
        names["posterior"] = kl.KronLaplace(names["model"], "classification").fit(names["train_loader"])
    with temporary_registrations():
        exec(compile(code, "page", "exec"), names)
    assert all(p.isfinite().all() for p in names["model"].parameters())
    if isinstance(names.get("optimizer"), (kl.NaturalGradient, kl.AdaptiveKFAC)):
        names["optimizer"].close()
    shown = re.findall(r"^print\(.*\)  # prints: (.*)$", code, flags=re.MULTILINE)
    assert set(shown) <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("page", TEXTS)
def test_no_code_is_left_out(page):
    """A fence with another word after ``python`` is run by the test that is named for it here, or not at all."""
    words = [word.strip() for word in re.findall(r"^[ >]*```(?:python|py)\b(.*)$", TEXTS[page], flags=re.MULTILINE)]
    assert words.count("") == len(CODE[page])
    for word in filter(None, words):
        assert word in (ROOT / RUN_ELSEWHERE[word]).read_text()


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    """Pages of the repository and their headings; pictures, too."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", TEXTS[page]):
        path = ROOT / page if not target else (ROOT / page).parent / target
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page}: {target}#{anchor}"


def test_the_readme_is_a_page():
    assert len(README.splitlines()) <= 140
    first = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
    assert len(first.strip().splitlines()) <= 15


def test_the_readme_has_the_two_commands():
    assert re.findall(r"^make \w+", README, flags=re.MULTILINE) == ["make demo", "make test"]


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r":\s*(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


# The entries of docs/api.md
API = re.findall(r"^::: (\S+)$", TEXTS["docs/api.md"], flags=re.MULTILINE)


def test_every_public_name_has_one_entry():
    listed = [name.removeprefix("kronlaplace.") for name in API]
    assert len(API) == len(set(API))
    assert set(kl.__all__) <= set(listed)
    documented = {name for name in kl.__all__ if name in ("damping", "metrics") or getattr(kl, name).__doc__}
    assert documented | {"SUPPORTED_LAYERS"} == set(kl.__all__)


@pytest.mark.parametrize("name", API)
def test_entries_are_found(name):
    module, _, attribute = name.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ImportError as error:  # the library that an integration is for
        assert module.startswith("kronlaplace.integrations.")
        pytest.skip(str(error))
    assert hasattr(found, attribute) or importlib.import_module(name)


def test_entries_show_inherited_members():
    """The methods of a block, likelihood, or estimator are documented on its base class."""
    options = (ROOT / "mkdocs.yml").read_text()
    assert "inherited_members: true" in options and "griffe_inherited_docstrings" in options


def test_every_paper_can_be_cited():
    """The first authors and years of docs/papers.md are in CITATION.cff."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    cited = set(re.findall(r"authors: \[\{ family-names: (\w+).*\n +year: (\d+)", citation))
    table = "".join(line for line in TEXTS["docs/papers.md"].splitlines(keepends=True) if line.startswith("|"))
    named = re.findall(r"(?:\| |; )(\w+)(?: et al\.| and \w+|, .*, and \w+)? (\d{4})", table)
    assert len(named) >= 13
    assert set(named) <= cited
