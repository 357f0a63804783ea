"""--mode quantize: the factors of a checkpoint as integers of 4 or 8 bits."""

from dataclasses import replace
from typing import Any

from component.modes import shared
from component.modes.parser import Flag, Options, from_zero
from component.modes.request import request_of
from component.quantize.names import BITS, METHODS
from component.quantize.settings import Settings
from utils.errors import UsageError

SUMMARY = "Store the factors of a checkpoint as integers."
INTEGERS = "rounding"


def eights(name: str, value: int) -> None:
    """Raises: UsageError for a group size that packing can't take."""
    if value < 8 or value % 8:
        raise UsageError(f"--{name} {value} is no multiple of 8")


FLAGS = (
    replace(shared.MODEL_PATH, help="Checkpoint whose factors are rounded."),
    shared.SAVE_PATH,
    shared.PREFIX,
    shared.RESUME,
    Flag(
        "bits", "Bits of a weight; with 4, some factors may get 8 (--integer_share).", INTEGERS, kind=int, default=4,
        choices=BITS,
    ),
    Flag(
        "group_size", "Input columns that share a scale, a multiple of 8; the last group may be shorter.", INTEGERS,
        kind=int, default=64, check=eights,
    ),
    Flag(
        "quantize_method", "Rounding with calibration text (gptq), or to nearest, without text (rtn).",
        INTEGERS, default="gptq", choices=METHODS,
    ),
    Flag(
        "act_order", "Let GPTQ take columns with the largest inputs first.", INTEGERS, kind=bool, default=True,
        negatable=True,
    ),
    Flag(
        "integer_share",
        "Largest size of the linears, as a share of theirs in float16; modules that lose most get more bytes.",
        INTEGERS, kind=float, default=0.32, check=from_zero,
    ),
    shared.OLD_OUTPUT_FACTOR,
    replace(shared.DRIFT_FACTOR, default=0.5),
    shared.DATASET,
    shared.MODEL_SEQ_LEN,
    replace(shared.RECONSTRUCT_NSAMPLES, help="Windows of calibration."),
    shared.HELDOUT_NSAMPLES,
    shared.SEED,
    shared.DEV,
    shared.DTYPE,
    shared.HOST_MEMORY,
)  # fmt: skip


def check(options: Options) -> None:
    """Raises: UsageError for a text or a folder that can't be."""
    shared.one_text(options)
    shared.check_folder(options)


def settings_of(options: Options) -> Settings:
    request = request_of(options, prefix=options.prefix)
    return shared.as_settings(Settings, options, request=request, method=options.quantize_method)


def run(options: Options) -> dict[str, Any]:
    """Quantize the checkpoint at --model_path; returns the result record."""
    from component.quantize.folder import quantize_folder

    return quantize_folder(settings_of(options))
