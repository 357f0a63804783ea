"""Line plots of results. matplotlib is an extra: without it there are no plots, and nothing else is missing."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

REQUIREMENTS = "requirements-plots.txt"


class Panel(NamedTuple):
    """One set of axes: a line of (x, y) points for each label."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Write the panels side by side as one image; needs matplotlib (see can_plot). No window, no global state.

    Every x that occurs is a tick, evenly spaced, so that sizes that double are as far apart as they look.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        ticks = sorted({x for line in panel.lines.values() for x, _ in line})
        for label, line in panel.lines.items():
            points = sorted(line)
            axes.plot([ticks.index(x) for x, _ in points], [y for _, y in points], marker="o", label=label)
        axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
