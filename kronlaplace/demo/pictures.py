"""The pictures of a demo, drawn through matplotlib's object interface: no pyplot, no global state, no window.

matplotlib comes with the `experiments` extra only; `available` says whether it is there. The MAP has one color and
every Laplace posterior the other, in all pictures; they can also be distinguished without color, by panel or line style.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kronlaplace.metrics import ReliabilityCurve

__all__ = ["available", "draw_coverage", "draw_predictive_band", "draw_reliability"]

FloatArray = npt.NDArray[np.float64]

_MAP_COLOUR, _LAPLACE_COLOUR, _GAP_COLOUR = "#d1701f", "#1f6fb4", "#c0392b"


def available() -> bool:
    """Tell whether matplotlib can be imported."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_reliability(
    path: Path, title: str, curves: Mapping[str, ReliabilityCurve], errors: Mapping[str, float]
) -> None:
    """Reliability diagrams side by side: accuracy per confidence bin, the gap to the diagonal, the confidences below.

    Args:
        path: The PNG file to write.
        title: What was predicted.
        curves: Per method, what `reliability_curve` gives.
        errors: Per method, the expected calibration error.
    """
    figure = _figure(4.2 * len(curves), 5.2)
    axes = figure.subplots(
        2, len(curves), sharex=True, sharey="row", squeeze=False, gridspec_kw={"height_ratios": [3, 1]}
    )
    for (top, bottom), (method, curve) in zip(axes.T, curves.items(), strict=True):
        n_bins = len(curve.count)
        edges = np.linspace(0.0, 1.0, n_bins + 1)[:-1]
        bar = {"width": 1.0 / n_bins, "align": "edge"}
        filled = curve.count > 0
        accuracy, confidence = curve.accuracy[filled], curve.confidence[filled]
        top.bar(edges[filled], accuracy, color=_color(method), edgecolor="white", label="accuracy", **bar)
        top.bar(
            edges[filled],
            confidence - accuracy,
            bottom=accuracy,
            color=_GAP_COLOUR,
            alpha=0.25,
            edgecolor=_GAP_COLOUR,
            hatch="//",
            label="gap to mean confidence",
            **bar,
        )
        top.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":", label="calibrated")
        top.set(title=f"{method}: ECE {errors[method]:.4f}", xlim=(0, 1), ylim=(0, 1))
        bottom.bar(edges, curve.count / curve.count.sum(), color="0.55", edgecolor="white", **bar)
        bottom.set(xlabel="confidence", ylim=(0, 1))
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("share of inputs")
    axes[0, 0].legend(loc="upper left", frameon=False)
    _finish(figure, path, title)


def draw_coverage(path: Path, title: str, nominal: FloatArray, empirical: Mapping[str, FloatArray]) -> None:
    """Nominal against empirical coverage of central intervals.

    Args:
        path: The PNG file to write.
        title: What was predicted.
        nominal: Levels of the intervals, `(L,)`.
        empirical: Per method, the share of test targets inside, `(splits, L)`; the mean over splits is drawn, with a
            band of one standard error.
    """
    figure = _figure(4.6, 4.6)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":", label="calibrated")
    for method, covered in empirical.items():
        mean = covered.mean(axis=0)
        gap = np.abs(mean - nominal).mean()
        label = f"{method} (mean gap {gap:.3f})"
        axes.plot(nominal, mean, color=_color(method), linestyle="--" if method == "MAP" else "-", label=label)
        if len(covered) > 1:
            error = covered.std(axis=0, ddof=1) / np.sqrt(len(covered))
            axes.fill_between(nominal, mean - error, mean + error, color=_color(method), alpha=0.2, linewidth=0)
    axes.set(
        xlabel="nominal level of the central interval",
        ylabel="share of test targets inside",
        xlim=(0, 1),
        ylim=(0, 1),
        aspect="equal",
    )
    axes.legend(loc="upper left", frameon=False)
    _finish(figure, path, title)


def draw_predictive_band(
    path: Path,
    title: str,
    grid: FloatArray,
    truth: FloatArray,
    mean: FloatArray,
    function_std: FloatArray,
    total_std: Mapping[str, FloatArray],
    data: tuple[FloatArray, FloatArray],
) -> None:
    """Mean and two-standard-deviation bands over a one-dimensional input, one panel per method.

    Args:
        path: The PNG file to write.
        title: What was predicted.
        grid: Inputs, `(M,)`.
        truth: The function without noise, `(M,)`.
        mean: Predictive mean, `(M,)`.
        function_std: Standard deviation of the function under the posterior, `(M,)`; drawn for "Laplace" only.
        total_std: Per method, the standard deviation of a new observation, `(M,)`.
        data: Training inputs and targets, `(N,)` each.
    """
    figure = _figure(4.6 * len(total_std), 3.6)
    panels = figure.subplots(1, len(total_std), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (method, std) in zip(panels, total_std.items(), strict=True):
        color = _color(method)
        axes.fill_between(
            grid, mean - 2 * std, mean + 2 * std, color=color, alpha=0.18, linewidth=0, label="± 2 std, with noise"
        )
        if method == "Laplace":
            low, high = mean - 2 * function_std, mean + 2 * function_std
            axes.fill_between(grid, low, high, color=color, alpha=0.35, linewidth=0, label="± 2 std, function")
        axes.plot(grid, mean, color=color, label="mean")
        axes.plot(grid, truth, color="black", linewidth=1, linestyle=":", label="truth")
        axes.scatter(*data, s=8, color="0.3", zorder=3, label="training data")
        axes.set(title=method, xlabel="input")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize="small")
    panels[0].set_ylabel("target")
    margin = 0.5 * np.ptp(data[1])
    panels[0].set_ylim(data[1].min() - margin, data[1].max() + margin)
    _finish(figure, path, title)


def _color(method: str) -> str:
    return _MAP_COLOUR if method == "MAP" else _LAPLACE_COLOUR


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
