"""What --mode quantize is told. Light: the front door imports it."""

from dataclasses import dataclass
from typing import Any

from component.checkpoint.request import Request


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How factors become integers; fields are named after the flags.

    method: gptq, with calibration text, or rtn. dataset to seed: of that text and its windows. host_memory: GiB of
    hidden states in host memory, None for any.
    """

    request: Request
    method: str
    bits: int
    group_size: int
    act_order: bool
    old_output_factor: float
    drift_factor: float
    integer_share: float
    dataset: str | None
    heldout_nsamples: int
    reconstruct_nsamples: int
    model_seq_len: int
    seed: int
    host_memory: float | None

    @property
    def calibrated(self) -> bool:
        return self.method == "gptq"

    def as_json(self) -> dict[str, Any]:
        """What decides the bytes beside the source, the dtype and the windows."""
        grid = {"method": self.method, "bits": self.bits, "group_size": self.group_size}
        if not self.calibrated:
            return grid
        return {
            **grid,
            "act_order": self.act_order,
            "old_output_factor": self.old_output_factor,
            "drift_factor": self.drift_factor,
            "integer_share": self.integer_share,
        }
