"""The tables of the documentation's results pages, written from CSV files.

    python -m experiments.results                   # write the tables into the pages
    python -m experiments.results --run quick       # run what is measured here, small, and compare its form
    python -m experiments.results --run full        # measure again, record the environment, and write the pages

A page has a table between two comments, ``<!-- table: NAME -->`` and ``<!-- end of table -->``. Its cells are in
``docs/results/data/NAME.csv``, as they are shown, and ``environments.json`` beside them says where they were measured.
The tables of `MEASURED` are measured again; all others keep the figures that are in their files.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from kronlaplace.demo.classification import COLUMNS as CLASSIFICATION
from kronlaplace.demo.regression import COLUMNS as REGRESSION

ROOT = Path(__file__).parent.parent
DATA = Path("docs/results/data")
ENVIRONMENTS = DATA / "environments.json"
REGION = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end of table -->", re.DOTALL)
DEMO = ("digits", "moons", "breast-cancer", "wine", "sine", "diabetes")
PACKAGES = ("torch", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Measured:
    """Tables that a command measures.

    Attributes:
        command: Arguments of Python; the command writes its files to the folder that follows them.
        quick: Further arguments, with which it takes a few seconds.
        threads: How many it takes.
        cells: From that folder, the rows of each table, the heading first.
    """

    command: list[str]
    quick: list[str]
    threads: int
    cells: Callable[[Path], dict[str, list[list[str]]]]


def demo_cells(folder):
    """The two tables of the demo, of those data sets that it has run."""
    columns = {"demo_classification": CLASSIFICATION, "demo_regression": REGRESSION}
    tables = {name: [["", "", *(column.heading for column in scores)]] for name, scores in columns.items()}
    for data in DEMO:
        path = folder / data / "table.csv"
        if not path.exists():
            continue
        rows = _read(path, csv.DictReader)
        name = next(name for name, scores in columns.items() if scores[0].key in rows[0])
        for i, row in enumerate(rows):
            scores = [f"{float(row[column.key]):.{column.decimals}f}" for column in columns[name]]
            tables[name].append(["" if i else data, row["method"], *scores])
    return {name: rows for name, rows in tables.items() if len(rows) > 1}


MEASURED = {
    "demo": Measured(["-m", "kronlaplace", "demo", "--out"], ["--dataset", "diabetes"], 1, demo_cells),
}


def environment(threads):
    """Where a measurement is made: versions, processor, threads, and the day."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "processor": _processor(),
        "threads": threads,
        "date": datetime.date.today().isoformat(),
    }


def _processor():
    try:
        return re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def _read(path, reader=csv.reader):
    with path.open(newline="", encoding="utf-8") as file:
        return list(reader(file))


def _write(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def rendered(name, root=ROOT):
    """A table in Markdown, and under it where its figures were measured."""
    heading, *rows = _read(root / DATA / f"{name}.csv")
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(heading))]
    rule = ["---:" if right else "---" for right in numeric]
    lines = ["| " + " | ".join(row) + " |" for row in (heading, rule, *rows)]
    where = json.loads((root / ENVIRONMENTS).read_text(encoding="utf-8"))[name]
    return "\n".join([*lines, "", f"*{described(where)}*"])


def _is_number(cell):
    return bool(re.match(r"[-+]?[\d.,]+|-?$", cell.strip("*"))) or cell == ""


def described(where):
    """One line about an environment, which is a dictionary or a sentence."""
    if isinstance(where, str):
        return f"Measured {where}."
    packages = ", ".join(f"{package} {where[package]}" for package in PACKAGES)
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    return f"Measured on {where['date']} with Python {where['python']}, {packages}; {where['processor']}, {threads}."


def with_tables(text, root=ROOT):
    """A page with its tables written anew."""
    return REGION.sub(
        lambda found: f"<!-- table: {found[1]} -->\n\n{rendered(found[1], root)}\n\n<!-- end of table -->", text
    )


def pages(root=ROOT):
    return sorted((root / "docs").rglob("*.md"))


def measure(measured, options, folder):
    """Run a command, and return the cells of its tables."""
    subprocess.run([sys.executable, *measured.command, str(folder), *options], check=True, cwd=ROOT, env=os.environ)
    return measured.cells(folder)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", choices=("quick", "full"), help="run the commands, not only write the pages")
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED))
    args = parser.parse_args(argv)
    for measured in (MEASURED[name] for name in args.only if args.run):
        with tempfile.TemporaryDirectory() as folder:
            tables = measure(measured, measured.quick if args.run == "quick" else [], Path(folder))
        for name, rows in tables.items():
            path = ROOT / DATA / f"{name}.csv"
            if args.run == "quick":
                if rows[0] != _read(path)[0]:
                    raise SystemExit(f"{name}: the columns are {rows[0]}, those of {path} are {_read(path)[0]}.")
                continue
            _write(path, rows)
            where = json.loads((ROOT / ENVIRONMENTS).read_text(encoding="utf-8")) | {
                name: environment(measured.threads)
            }
            (ROOT / ENVIRONMENTS).write_text(json.dumps(where, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"written: {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
