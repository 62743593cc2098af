"""The run itself: check everything first, then one data set after the other."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from kronlaplace.demo import classification, pictures, regression
from kronlaplace.demo.data import ClassificationData
from kronlaplace.demo.datasets import EMBEDDED, check_name, load
from kronlaplace.demo.errors import DemoError
from kronlaplace.demo.fitting import Settings
from kronlaplace.demo.report import Table
from kronlaplace.estimators import SHORTHANDS

__all__ = ["run_demo"]

_NO_PICTURES = "No pictures are drawn: matplotlib is not installed (pip install 'kronlaplace[experiments]')."


def run_demo(
    names: Sequence[str] = EMBEDDED,
    *,
    estimator: str | None = None,
    data_dir: str | Path | None = None,
    seed: int = 0,
    out: str | Path = "demo-results",
    device: str = "auto",
    n_splits: int | None = None,
    echo: Callable[[str], object] = print,
) -> dict[str, Table]:
    """Run the demo on each named data set and write its results to `out/<name>/`.

    Names, estimator, device, data files and the output folder are checked for all data sets before the first network is
    trained.

    Args:
        names: Data sets, see `kronlaplace.demo.datasets`; by default all that need no file. Repeated names run once.
        estimator: Shorthand of the curvature estimator; the default of `KronLaplace` without it.
        data_dir: Folder with `mnist/` and `uci/`, for the data sets that are not embedded.
        seed: Decides initial weights, batch order and the data of `moons` and `sine`.
        out: Folder for the results; made if it is not there.
        device: `"cpu"`, `"cuda"`, or `"auto"` for CUDA where there is one.
        n_splits: How many of the published splits of a UCI data set; all without it.
        echo: Takes each line of the report.

    Returns:
        The tables by name.

    Raises:
        DemoError: The demo cannot run as asked; the message is one line.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        check_name(name)
    if estimator is not None:
        _check_estimator(estimator)
    shown = estimator or "default estimator"
    settings = Settings(estimator, _resolve_device(device), seed, pictures.available())
    loaded = [load(name, data_dir, seed=seed, n_splits=n_splits) for name in names]
    folders = [_make_folder(Path(out) / name) for name in names]
    if not settings.pictures:
        echo(_NO_PICTURES)

    tables = {}
    for data, folder in zip(loaded, folders, strict=True):
        task = classification if isinstance(data, ClassificationData) else regression
        echo(f"{data.name}: {task.describe(data)}; {shown} on {settings.device}, seed {seed}")
        began = time.perf_counter()
        with _one_thread():
            outcome = task.run(data, settings, folder)
        table_files = [folder / "table.csv", folder / "table.md"]
        outcome.table.write_csv(table_files[0])
        notes = [outcome.title, f"{shown}, seed {seed}", *outcome.notes]
        table_files[1].write_text(outcome.table.to_markdown(data.name, notes), encoding="utf-8")
        echo(f"\n{outcome.table.to_text()}\n")
        for note in outcome.notes:
            echo(f"  {note}")
        echo(f"  {time.perf_counter() - began:.1f} s; wrote {_listed(folder, table_files + outcome.files)}\n")
        tables[data.name] = outcome.table
    return tables


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one CPU thread inside, and as many as before afterwards.

    Sums over a batch are split among threads, so their rounding, and with it the table, would depend on the number of
    cores. The networks are small: on busy cores more threads are slower, up to twenty times.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_estimator(name: str) -> None:
    if name not in SHORTHANDS:
        near = difflib.get_close_matches(name.lower(), SHORTHANDS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise DemoError(f"unknown estimator '{name}'.{hint} Known: {', '.join(SHORTHANDS)}.")


def _resolve_device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise DemoError(f"unknown device '{name}'. Known: auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise DemoError("no CUDA device is available to PyTorch; use --device cpu, or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot make the output folder {folder}: {error.strerror}; choose another --out.") from error
    if not os.access(folder, os.W_OK):
        raise DemoError(f"the output folder {folder} is not writable; choose another --out.")
    return folder


def _listed(folder: Path, files: Sequence[Path]) -> str:
    """`folder: a, b, c`, a run of posteriors named by its first and last."""
    names = [file.name for file in files]
    posteriors = [name for name in names if name.startswith("posterior_split_")]
    if len(posteriors) > 2:
        first = names.index(posteriors[0])
        names = [name for name in names if name not in posteriors]
        names.insert(first, f"{posteriors[0]} to {posteriors[-1]}")
    return f"{folder}: {', '.join(names)}"
