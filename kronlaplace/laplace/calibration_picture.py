"""The picture of a report: calibration of two methods in one pair of axes.

It is drawn through matplotlib's object interface: no pyplot, no global state, no window. matplotlib is imported only here,
when something is drawn. The methods can be distinguished without color, by marker and line style.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CalibrationCurve", "draw", "pooled"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CalibrationCurve:
    """What was observed against what was predicted.

    Attributes:
        predicted: Mean confidence by bin, or nominal levels of intervals, ``(B,)``.
        observed: Accuracy by bin, or shares of the targets inside the intervals, ``(B,)``.
        count: Number of targets behind each point, ``(B,)``.
    """

    predicted: FloatArray
    observed: FloatArray
    count: npt.NDArray[np.int64]


_FEWEST = 10
"""A point of a curve stands for at least this number of targets, because the accuracy of fewer says next to nothing."""


def pooled(curve: CalibrationCurve) -> CalibrationCurve:
    """Return a curve in which neighboring bins with few targets are one."""
    count, starts = curve.count, [0]
    for i in range(1, len(count)):
        if min(count[starts[-1] : i].sum(), count[i:].sum()) >= _FEWEST:
            starts.append(i)
    together = np.add.reduceat(count, starts)
    predicted, observed = (
        np.add.reduceat(count * values, starts) / together for values in (curve.predicted, curve.observed)
    )
    return CalibrationCurve(predicted, observed, together)


_STYLES: Mapping[str, Mapping[str, Any]] = {
    "MAP": {"color": "#d1701f", "linestyle": "--", "marker": "o"},
    "posterior": {"color": "#1f6fb4", "linestyle": "-", "marker": "s"},
}


def draw(where: str | PathLike[str] | Any, curves: Mapping[str, CalibrationCurve], regression: bool, n: int) -> Any:
    """Draw into a file or into axes and return the axes; arguments as in `Report.plot`."""
    try:
        from matplotlib.axes import Axes
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing a report needs matplotlib, which is not installed: pip install 'kronlaplace[experiments]'."
        ) from error
    if isinstance(where, Axes):
        _draw_curves(where, curves, regression)
        return where
    if not isinstance(where, (str, PathLike)):
        raise TypeError(f"plot takes a path, such as 'report.png', or matplotlib axes; got {type(where).__name__}.")
    figure = Figure(figsize=(4.8, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_curves(axes, curves, regression)
    axes.set_title(f"Calibration on {n:,} examples")
    figure.savefig(where, dpi=150)
    return axes


def _draw_curves(axes: Any, curves: Mapping[str, CalibrationCurve], regression: bool) -> None:
    axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":", label="calibrated")
    for method, curve in curves.items():
        style = _STYLES[method]
        color = style["color"]
        low, high = _standard_interval(curve)
        line = {"color": color, "linestyle": style["linestyle"], "linewidth": 1.5, "label": method}
        if regression:
            axes.plot(curve.predicted, curve.observed, **line)
            axes.fill_between(curve.predicted, low, high, color=color, alpha=0.2, linewidth=0)
            continue
        axes.plot(curve.predicted, curve.observed, marker=style["marker"], markersize=4, **line)
        axes.vlines(curve.predicted, low, high, color=color, linewidth=1)
        area = 16 + 150 * curve.count / curve.count.sum()
        axes.scatter(curve.predicted, curve.observed, s=area, color=color, marker=style["marker"], alpha=0.6, zorder=3)
    x, y = ("level of the central interval", "share of targets inside") if regression else ("confidence", "accuracy")
    axes.set(xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)


def _standard_interval(curve: CalibrationCurve) -> tuple[FloatArray, FloatArray]:
    """Return Wilson's interval of one standard error, which has a width at shares of 0 and 1, too."""
    share, n = curve.observed, curve.count
    center = (share + 0.5 / n) / (1 + 1 / n)
    half_width = np.sqrt(share * (1 - share) / n + 0.25 / n**2) / (1 + 1 / n)
    return center - half_width, center + half_width
