"""What --mode finetune is told. Light: the front door imports it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from component.checkpoint.request import Request

UNDECISIVE = ("request", "gradient_checkpointing", "save_steps")  # these change no number of the result


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How factors are trained; fields are named after the flags. max_steps, where it is a number, overrides num_epochs.

    compute_dtype: of the forward pass; teacher: `original`, or a model; save_steps: between states that --resume goes
    on from, 0 for none.
    """

    request: Request
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
    gradient_checkpointing: bool
    save_steps: int

    def as_json(self) -> dict[str, Any]:
        """All that decides the result beside the source and the data, without what is not used."""
        unused: tuple[str, ...] = ("lora_r", "lora_alpha", "lora_dropout") if self.order == "full" else ()
        unused += () if self.teacher else ("teacher",)
        return {name: value for name, value in asdict(self).items() if name not in (*UNDECISIVE, *unused)}

    def steps(self, rows: int) -> int:
        """Of each stage, over so many rows."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_epochs is not None
        return max(1, math.ceil(self.num_epochs * rows / self.batch_size))
