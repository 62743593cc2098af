"""What the examples share: their options, and how they draw."""

import argparse
from pathlib import Path

from matplotlib.figure import Figure


def arguments(description, argv):
    """Read the options of an example."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="train so little that only the program itself is shown")
    parser.add_argument("--out", type=Path, default=Path("example-results"), help="folder of the picture")
    return parser.parse_args(argv)


def figure(columns=1, width=6, height=3.4):
    """Make a figure and its panels, in one row."""
    picture = Figure(figsize=(width, height), layout="constrained")
    panels = picture.subplots(1, columns, squeeze=False)[0]
    return picture, panels


def save(picture, args, name):
    """Write a picture, and say where."""
    args.out.mkdir(parents=True, exist_ok=True)
    picture.savefig(args.out / name, dpi=150)
    print(f"drawn in {args.out / name}")
