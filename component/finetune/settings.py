"""The flags of --mode finetune, checked, with the defaults of the order that was asked for."""

import math
from argparse import Namespace
from dataclasses import asdict, dataclass
from typing import Any

import torch

from component.finetune.data import SELF
from utils.errors import UsageError, check_choice
from utils.models import DTYPES

ORDERS = ("sequential", "joint", "full")
COMPUTE_DTYPES = ("float32", "bfloat16")  # float16 would need its loss scaled, and overflows even so
# of SVD-LLM's recipe for LoRA, and of PIFA, appendix B.3, for all factors
LORA: dict[str, Any] = {
    "num_epochs": 2,
    "learning_rate": 1e-4,
    "batch_size": 64,
    "micro_batch_size": 4,
    "cutoff_len": 256,
}
FULL: dict[str, Any] = {
    "data_path": ["wikitext2:0.02", "c4:0.98"],
    "max_steps": 1000,
    "learning_rate": 3e-6,
    "batch_size": 128,
    "micro_batch_size": 1,
    "cutoff_len": 1024,
}


@dataclass(frozen=True)
class Settings:
    """All that decides the result beside the source and the data. max_steps, where given, overrides num_epochs."""

    order: str
    data_path: list[str]
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    num_epochs: float | None
    max_steps: int | None
    learning_rate: float
    warmup_ratio: float
    batch_size: int
    micro_batch_size: int
    cutoff_len: int
    compute_dtype: str
    seed: int
    teacher: str | None

    def as_json(self) -> dict[str, Any]:
        """Without what is not used."""
        unused: tuple[str, ...] = ("lora_r", "lora_alpha", "lora_dropout") if self.order == "full" else ()
        unused += () if self.teacher else ("teacher",)
        return {name: value for name, value in asdict(self).items() if name not in unused}

    def steps(self, rows: int) -> int:
        """Of each stage, over so many rows."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_epochs is not None
        return max(1, math.ceil(self.num_epochs * rows / self.batch_size))


def read_settings(options: Namespace) -> Settings:
    """Raises: UsageError for a value that can't be."""

    def given(name: str, default: Any = None) -> Any:
        value = getattr(options, name, None)
        return default if value is None else value

    order = given("order", "sequential")
    check_choice("--order", order, ORDERS)
    defaults = FULL if order == "full" else LORA
    if given("data_path", defaults.get("data_path")) is None:
        raise UsageError(f"--order {order} needs --data_path: instructions (.json, .jsonl), texts or named datasets")
    steps = {name: given(name) for name in ("num_epochs", "max_steps")}
    if steps["num_epochs"] is None and steps["max_steps"] is None:
        steps = {name: defaults.get(name) for name in steps}
    sizes = {name: given(name, defaults[name]) for name in ("batch_size", "micro_batch_size", "cutoff_len")}
    if given("micro_batch_size") is None:
        sizes["micro_batch_size"] = min(sizes["micro_batch_size"], sizes["batch_size"])
    on_gpu = torch.device(options.DEV).type == "cuda"
    entries = list(given("data_path", defaults.get("data_path")))
    writes = any(entry == SELF or entry.startswith(f"{SELF}:") for entry in entries)
    if writes and (given("teacher") is None or steps["max_steps"] is None):
        raise UsageError(f"--data_path {SELF} is what a --teacher writes, for as long as --max_steps says: give both")
    settings = Settings(
        order=order,
        data_path=entries,
        lora_r=given("lora_r", 8),
        lora_alpha=given("lora_alpha", 16),
        lora_dropout=given("lora_dropout", 0.05),
        learning_rate=given("learning_rate", defaults["learning_rate"]),
        warmup_ratio=given("warmup_ratio", 0.05),
        compute_dtype=given("compute_dtype", "bfloat16" if on_gpu else "float32"),
        seed=options.seed,
        teacher=given("teacher"),
        **steps,
        **sizes,
    )
    _check(settings)
    return settings


def compute_dtype(settings: Settings) -> torch.dtype:
    return DTYPES[settings.compute_dtype]


def _check(settings: Settings) -> None:
    least = {"lora_r": 1, "max_steps": 1, "batch_size": 1, "micro_batch_size": 1, "cutoff_len": 2}
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise UsageError(f"--{name} {value} is below {bound}")
    for name in ("num_epochs", "learning_rate", "lora_alpha"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} {value:g} is no number above 0")
    for name in ("warmup_ratio", "lora_dropout"):
        if not 0 <= getattr(settings, name) < 1:
            raise UsageError(f"--{name} {getattr(settings, name):g} is outside [0,1)")
    if settings.micro_batch_size > settings.batch_size:
        raise UsageError(f"--micro_batch_size {settings.micro_batch_size} is above --batch_size {settings.batch_size}")
    check_choice("--compute_dtype", settings.compute_dtype, COMPUTE_DTYPES)
