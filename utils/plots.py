"""Line plots of results. matplotlib is an extra: without it there are no plots, and nothing else is missing."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

REQUIREMENTS = "requirements-plots.txt"


class Panel(NamedTuple):
    """One set of axes: a line of (x, y) points for each label.

    Every x that occurs is a tick, and they are evenly spaced, so that sizes that double are as far apart as they look;
    or to scale, from zero on, where it is to be seen whether y is proportional to x.
    """

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    to_scale: bool = False


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Write the panels side by side as one image; needs matplotlib (see can_plot). No window, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        ticks = sorted({x for line in panel.lines.values() for x, _ in line})
        places = {x: x if panel.to_scale else index for index, x in enumerate(ticks)}
        for label, line in panel.lines.items():
            points = sorted(line)
            axes.plot([places[x] for x, _ in points], [y for _, y in points], marker="o", label=label)
        axes.set_xticks(list(places.values()), [f"{tick:g}" for tick in ticks])
        if panel.to_scale:
            axes.set_xlim(left=0)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
