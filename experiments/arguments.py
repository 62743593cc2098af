"""Command-line options that the experiments share."""

from __future__ import annotations

from pathlib import Path

import torch


def add_machine(parser, out):
    """Add the options for where a program runs and where it writes: threads, device, and the folder."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("experiment-results") / out)


def prepare_machine(args):
    """Make the folder, and set the number of threads."""
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
