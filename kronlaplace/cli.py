"""The command line: `kronlaplace demo`, `kronlaplace --version`.

User errors are reported in one line on standard error and exit code 2, without a traceback.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from kronlaplace import __version__
from kronlaplace.demo import DemoError, run_demo
from kronlaplace.demo.datasets import DATA_VARIABLE, EMBEDDED, N_UCI_SPLITS, UCI
from kronlaplace.estimators import SHORTHANDS

__all__ = ["main"]

_USAGE_ERROR = 2
_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Argument errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE_ERROR, f"{self.prog}: error: {message} (see '{self.prog} --help')\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: Arguments without the program's name; `sys.argv[1:]` if None.

    Returns:
        Exit code: 0 if all went well, 2 for something the user can put right, 130 if interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without "±" should not stop the program
    parser = _make_parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as end:  # argparse has printed its message
        return end.code if isinstance(end.code, int) else 0
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return _USAGE_ERROR
    try:
        run_demo(
            arguments.dataset or EMBEDDED,
            estimator=arguments.estimator,
            data_dir=arguments.data_dir,
            seed=arguments.seed,
            out=arguments.out,
            device=arguments.device,
            n_splits=arguments.splits,
            echo=lambda line: print(line, flush=True),
        )
    except DemoError as error:
        print(f"kronlaplace demo: error: {error}", file=sys.stderr)
        return _USAGE_ERROR
    except KeyboardInterrupt:
        print("kronlaplace demo: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kronlaplace", description="Kronecker-factored Laplace posteriors of trained networks.")
    parser.add_argument("--version", action="version", version=f"kronlaplace {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a network, fit and tune its Laplace posterior, compare it with the MAP",
        description=(
            "Train a network, fit and tune its Kronecker-factored Laplace posterior with the library's defaults, print one "
            f"table, MAP next to Laplace, and draw pictures. Data sets that need no file: {', '.join(EMBEDDED)}. "
            f"From a data directory: mnist, {', '.join(UCI)}."
        ),
    )
    add = demo.add_argument
    add("--dataset", nargs="+", action="extend", metavar="NAME", help="data sets (default: all that need no file)")
    add("--estimator", metavar="NAME", help=f"one of {', '.join(SHORTHANDS)} (default: the library's)")
    add("--data-dir", metavar="DIR", help=f"folder with mnist/ and uci/ (default: ${DATA_VARIABLE})")
    add("--seed", type=_whole(0, 2**32 - 1), default=0, metavar="N", help="seed of all random numbers (default: 0)")
    add("--out", default="demo-results", metavar="DIR", help="results, one folder each (default: demo-results)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (default: auto)")
    add(
        "--splits",
        type=_whole(1, N_UCI_SPLITS),
        metavar="N",
        help=f"how many of the {N_UCI_SPLITS} published splits of the UCI data sets (default: all)",
    )
    return parser


def _whole(low: int, high: int) -> Callable[[str], int]:
    """Make an argument type: whole numbers from `low` to `high`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {low} to {high}")
        return value

    return convert
