"""The pictures of a demo, drawn through matplotlib's object interface: no pyplot, no global state, no window.

matplotlib comes with the `experiments` extra only; `available` says whether it is there. The MAP has one color and
every Laplace posterior the other, in all pictures; they can also be distinguished without color, by panel or line style.
Legends are below the axes, where they cover nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kronlaplace.demo.fitting import LAST_LAYER, MAP
from kronlaplace.metrics import ReliabilityCurve

__all__ = [
    "Turning",
    "available",
    "draw_coverage",
    "draw_plane",
    "draw_predictive_band",
    "draw_reliability",
    "draw_turned",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_MAP_COLOUR, _LAPLACE_COLOUR, _GAP_COLOUR = "#d1701f", "#1f6fb4", "#c0392b"


@dataclass(frozen=True)
class Turning:
    """One method's predictions of an image that is turned by `A` angles, every so many of which are `S` coarse ones.

    Attributes:
        confidence: Probability of the predicted class at every angle, `(A,)`.
        predicted: Predicted class at the coarse angles, `(S,)`.
        mean_confidence: Mean confidence over many images at the coarse angles, `(S,)`.
    """

    confidence: FloatArray
    predicted: IntArray
    mean_confidence: FloatArray


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
        top.bar(edges[filled], accuracy, color=_color(method), alpha=0.7, edgecolor="white", label="accuracy", **bar)
        gap = {"facecolor": "none", "edgecolor": _GAP_COLOUR, "hatch": "///", "linewidth": 0.8}
        top.bar(edges[filled], confidence - accuracy, bottom=accuracy, label="gap to mean confidence", **gap, **bar)
        top.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":", label="calibrated")
        top.set(title=f"{method}: ECE {errors[method]:.4f}", xlim=(0, 1), ylim=(0, 1))
        bottom.bar(edges, curve.count / curve.count.sum(), color="0.55", edgecolor="white", **bar)
        bottom.set(
            xlabel="confidence",
            ylim=(0, 1),
            xticks=[0, 0.25, 0.5, 0.75, 1],
            xticklabels=["0", "0.25", "0.5", "0.75", "1"],
        )
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("share of inputs")
    _legend(figure, axes[0, 0])
    _finish(figure, path, title)


def draw_turned(
    path: Path,
    title: str,
    angles: tuple[FloatArray, FloatArray],
    images: npt.NDArray[np.float32],
    lines: Mapping[str, Turning],
    mean_label: str,
) -> None:
    """Confidence in an image as it is turned, with the turned images and the predicted classes above the axis.

    Args:
        path: The PNG file to write.
        title: What is turned.
        angles: All angles in degrees, `(A,)`, and the equidistant coarse ones among them, `(S,)`.
        images: The image at the coarse angles, `(S, H, W)`.
        lines: Per method, its predictions.
        mean_label: Over what the mean is taken.
    """
    fine, coarse = angles
    figure = _figure(8.0, 4.8)
    strip, axes = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1.1, 3]})
    half = 0.47 * (coarse[1] - coarse[0])
    for angle, image in zip(coarse, images, strict=True):
        limits = {"vmin": images.min(), "vmax": images.max()}
        strip.imshow(image, cmap="gray_r", extent=(angle - half, angle + half, 0, 1), aspect="auto", **limits)
    heights = [-0.25 - 0.38 * i for i in range(len(lines))]
    for height, (method, line) in zip(heights, lines.items(), strict=True):
        for angle, label in zip(coarse, line.predicted, strict=True):
            strip.text(angle, height, str(label), color=_color(method), ha="center", va="center", weight="bold")
    strip.set(
        ylim=(heights[-1] - 0.2, 1), yticks=[0.5, *heights], yticklabels=["input", *(f"class by {m}" for m in lines)]
    )
    strip.tick_params(length=0, labelbottom=False)
    strip.spines[:].set_visible(False)
    for method, line in lines.items():
        style = {"color": _color(method), "linestyle": _line_style(method)}
        axes.plot(fine, line.confidence, linewidth=2.2, label=f"{method}: this image", **style)
        axes.plot(coarse, line.mean_confidence, linewidth=0.9, label=f"{method}: {mean_label}", **style)
    axes.set(
        xlabel="angle in degrees",
        ylabel="confidence",
        xticks=coarse,
        xlim=(coarse[0] - half, coarse[-1] + half),
        ylim=(0, 1.03),
    )
    axes.grid(axis="y", color="0.9")
    _legend(figure, axes, 2)
    _finish(figure, path, title)


def draw_plane(
    path: Path,
    title: str,
    ticks: FloatArray,
    probabilities: Mapping[str, FloatArray],
    data: tuple[npt.NDArray[np.float32], IntArray],
) -> None:
    """Confidence over the plane, one panel per method, with the training data and the boundary between the classes.

    Args:
        path: The PNG file to write.
        title: What was predicted.
        ticks: Coordinates of the grid along either axis, `(M,)`.
        probabilities: Per method, the probability of the second of two classes, `(M, M)`, rows along the second axis.
        data: Training inputs `(N, 2)` and labels `(N,)`.
    """
    figure = _figure(4.6 * len(probabilities) + 0.8, 5.2)
    panels = figure.subplots(1, len(probabilities), sharex=True, sharey=True, squeeze=False)[0]
    inputs, labels = data
    for axes, (method, p) in zip(panels, probabilities.items(), strict=True):
        confidence = np.maximum(p, 1 - p)
        filled = axes.contourf(ticks, ticks, confidence, levels=np.linspace(0.5, 1.0, 21), cmap="viridis")
        axes.contour(ticks, ticks, p, levels=[0.5], colors="white", linewidths=1, linestyles="--")
        for label, color, marker in ((0, "white", "o"), (1, "black", "^")):
            of_class = inputs[labels == label]
            style = {"s": 9, "color": color, "edgecolor": "0.3", "linewidth": 0.3}
            axes.scatter(*of_class.T, marker=marker, label=f"training data, class {label}", **style)
        axes.set(title=f"{method}: mean confidence {confidence.mean():.2f}", xlabel="first feature, standardized")
        axes.set(aspect="equal", xticks=np.arange(-10, 11, 5), yticks=np.arange(-10, 11, 5))
    panels[0].set_ylabel("second feature, standardized")
    bar = figure.colorbar(filled, ax=list(panels), ticks=np.linspace(0.5, 1.0, 6), shrink=0.9)
    bar.set_label("confidence: probability of the predicted class")
    _legend(figure, panels[0])
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
    figure = _figure(4.6, 5.4)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":", label="calibrated")
    for method, covered in empirical.items():
        mean = covered.mean(axis=0)
        gap = np.abs(mean - nominal).mean()
        label = f"{method} (mean gap {gap:.3f})"
        axes.plot(nominal, mean, color=_color(method), linestyle=_line_style(method), label=label)
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
    _legend(figure, axes, 1)
    _finish(figure, path, title)


def draw_predictive_band(
    path: Path,
    title: str,
    grid: FloatArray,
    truth: FloatArray,
    mean: FloatArray,
    function_std: Mapping[str, FloatArray],
    total_std: Mapping[str, FloatArray],
    data: tuple[FloatArray, FloatArray],
) -> None:
    """Mean and two-standard-deviation bands over a one-dimensional input, one panel per method.

    The widest interval between neighboring training inputs is shaded. The axes end 1.5 times the range of the data above
    and below them, and cut off what is farther away.

    Args:
        path: The PNG file to write.
        title: What was predicted.
        grid: Inputs, `(M,)`.
        truth: The function without noise, `(M,)`.
        mean: Predictive mean, `(M,)`.
        function_std: Per method that has one, the standard deviation of the function under the posterior, `(M,)`.
        total_std: Per method, the standard deviation of a new observation, `(M,)`.
        data: Training inputs and targets, `(N,)` each.
    """
    figure = _figure(4.6 * len(total_std), 4.4)
    panels = figure.subplots(1, len(total_std), sharex=True, sharey=True, squeeze=False)[0]
    inputs = np.sort(data[0])
    widest = int(np.diff(inputs).argmax())
    for axes, (method, std) in zip(panels, total_std.items(), strict=True):
        axes.axvspan(inputs[widest], inputs[widest + 1], color="0.93", linewidth=0, label="no training data")
        axes.fill_between(
            grid,
            mean - 2 * std,
            mean + 2 * std,
            color=_color(method),
            alpha=0.2,
            linewidth=0,
            label="± 2 std, with noise",
        )
        if method in function_std:
            low, high = mean - 2 * function_std[method], mean + 2 * function_std[method]
            axes.fill_between(grid, low, high, color=_color(method), alpha=0.35, linewidth=0, label="± 2 std, function")
        axes.plot(grid, mean, color=_color(method), label="mean")
        axes.plot(grid, truth, color="black", linewidth=1, linestyle=":", label="truth")
        axes.scatter(*data, s=8, color="0.3", zorder=3, label="training data")
        axes.set(title=method, xlabel="input", xlim=(grid[0], grid[-1]))
    panels[0].set_ylabel("target")
    deviation = 2.05 * np.max(list(total_std.values()), axis=0)
    low, high, span = data[1].min(), data[1].max(), np.ptp(data[1])
    panels[0].set_ylim(
        np.clip((mean - deviation).min(), low - 1.5 * span, low - 0.25 * span),
        np.clip((mean + deviation).max(), high + 0.25 * span, high + 1.5 * span),
    )
    _legend(figure, panels[-1])
    _finish(figure, path, title)


def _color(method: str) -> str:
    return _MAP_COLOUR if method == MAP else _LAPLACE_COLOUR


def _line_style(method: str) -> str:
    return {MAP: "--", LAST_LAYER: ":"}.get(method, "-")


def _legend(figure: Any, axes: Any, n_columns: int = 3) -> None:
    """One legend for the figure, below all axes."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=n_columns, frameon=False, markerscale=1.6)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
