"""The documentation's tables are those of their CSV files, and each says where it was measured."""

import json

import numpy as np
import pytest

from experiments import results
from kronlaplace.demo.report import Table

ENVIRONMENT = {
    "python": "3.11.1",
    **dict.fromkeys(results.PACKAGES, "1.0"),
    "processor": "Some CPU",
    "threads": 2,
    "date": "2026-11-27",
}


@pytest.mark.parametrize("page", results.pages(), ids=lambda page: page.name)
def test_pages_are_as_written(page):
    text = page.read_text(encoding="utf-8")
    assert results.with_tables(text) == text, "run `make results`"


def test_every_file_is_a_table_of_one_page():
    text = "".join(page.read_text(encoding="utf-8") for page in results.pages())
    shown = sorted(found[1] for found in results.REGION.finditer(text))
    assert shown == sorted(path.stem for path in (results.ROOT / results.DATA).glob("*.csv"))
    assert shown == sorted(json.loads((results.ROOT / results.ENVIRONMENTS).read_text(encoding="utf-8")))


def test_results_pages_have_no_other_tables():
    for page in (results.ROOT / "docs" / "results").glob("*.md"):
        assert "\n|" not in results.REGION.sub("", page.read_text(encoding="utf-8"))


def test_a_table_is_written(tmp_path):
    folder = tmp_path / results.DATA
    folder.mkdir(parents=True)
    (folder / "scores.csv").write_text("method,NLL\nMAP,0.5\n**ours**,-0.25\n")
    (folder / "environments.json").write_text(json.dumps({"scores": ENVIRONMENT}))
    page = "before\n<!-- table: scores -->\nanything\n<!-- end of table -->\nafter"
    written = results.with_tables(page, tmp_path)
    assert "| method | NLL |\n| --- | ---: |\n| MAP | 0.5 |\n| **ours** | -0.25 |\n" in written
    assert "2026-11-27 with Python 3.11.1, torch 1.0, numpy 1.0, scikit-learn 1.0; Some CPU, 2 threads." in written
    assert written.startswith("before\n<!--") and written.endswith("-->\nafter")
    assert results.with_tables(written, tmp_path) == written


def test_the_demos_tables(tmp_path):
    (tmp_path / "diabetes").mkdir()
    table = Table(results.REGRESSION, {"MAP": np.array([[57.4391, -5.68512, 0.4, 0.7, 0.8]])})
    table.write_csv(tmp_path / "diabetes" / "table.csv")
    heading, row = results.demo_cells(tmp_path)["demo_regression"]
    assert heading == results._read(results.ROOT / results.DATA / "demo_regression.csv")[0]
    assert row == ["diabetes", "MAP", "57.439", "-5.685", "0.400", "0.700", "0.800"]
