"""Each example runs, in its quick form, prints what it found and draws its picture; the documentation shows all of them."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem not in ("__init__", "common"))

pytestmark = pytest.mark.usefixtures("same_threads")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings(  # after so little training
    "ignore:the evidence is largest at the edge",
    "ignore:the scale of the logits",
)
def test_example(name, tmp_path, capsys):
    importlib.import_module(f"examples.{name}").main(["--quick", "--out", str(tmp_path)])
    (picture,) = tmp_path.iterdir()
    assert picture.name == f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_the_documentation_shows_the_example(name):
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert f'```python example\n--8<-- "examples/{name}.py"\n```' in page
    assert f"(images/{name}.png)" in page
