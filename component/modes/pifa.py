"""--mode pifa: a folder of low-rank factors in, a folder of pivots and coefficients out."""

from dataclasses import replace
from typing import Any

from component.modes import shared
from component.modes.parser import Flag, Options
from component.modes.request import request_of
from component.pivot.settings import Settings

SUMMARY = "Turn low-rank factors into pivots and coefficients: smaller and faster, the same function."
FLAGS = (
    replace(shared.MODEL_PATH, help="Checkpoint of --mode m to pivot.", shown="the newest one under --save_path"),
    shared.SAVE_PATH,
    shared.RESUME,
    Flag(
        "fold", "Let the next linear read outputs in pivot order, where it can; this saves the reordering.",
        "pivoting", kind=bool, default=False, only=True,
    ),
    shared.DEV,
    shared.DTYPE,
)  # fmt: skip


check = shared.check_folder


def settings_of(options: Options) -> Settings:
    return Settings(request=request_of(options, prefix=""), fold=options.fold)


def run(options: Options) -> dict[str, Any]:
    """Pivot the checkpoint at --model_path; returns the result record."""
    from component.pivot.folder import pivot_folder

    return pivot_folder(settings_of(options))
