"""Loss curves: in parts for the record, as a file and as a picture beside the checkpoint."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from component.finetune.loop import Point
from utils import plots
from utils.whole_files import write_json

log = logging.getLogger("pifa")

CURVES, PLOT = "finetune.json", "finetune.png"
PARTS = 20  # of a loss curve in the plot and in the record


def averaged(curve: Sequence[Point]) -> list[list[Any]]:
    """The curve in at most PARTS parts: the last step of each and the mean loss of its steps that counted."""
    size = max(1, -(-len(curve) // PARTS))
    parts = []
    for start in range(0, len(curve), size):
        losses = [point["loss"] for point in curve[start : start + size] if point["loss"] is not None]
        last = curve[start : start + size][-1]["step"]
        parts.append([last, sum(losses) / len(losses) if losses else None])
    return parts


def write_curves(folder: Path, curves: dict[str, list[Point]]) -> None:
    """Every step of every stage as JSON, and the averages drawn where matplotlib is installed."""
    write_json(folder / CURVES, curves)
    if not plots.can_plot():
        log.warning("no plot of the loss without matplotlib: pip install -r %s", plots.REQUIREMENTS)
        return
    panels = [
        plots.Panel(
            title=stage,
            x_label="step",
            y_label="loss",
            lines={"mean since the last point": [(x, y) for x, y in averaged(curve) if y is not None]},
        )
        for stage, curve in curves.items()
    ]
    plots.draw_panels(folder / PLOT, panels)
