"""Result records: what every run prints as its last line and keeps beside its checkpoint."""

import importlib.metadata
import platform
import sys
import time
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "numpy", "gguf", "peft", "lm_eval")
GIB = 2**30


class Stopwatch:
    """Wall-clock seconds and peak memory since it was made."""

    def __init__(self, device: torch.device):
        self.device = device
        self.began = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def seconds(self) -> float:
        return round(time.perf_counter() - self.began, 3)

    def readings(self) -> dict[str, float]:
        """seconds, peak_memory_gib (of the device: on CPU of the process), peak_host_memory_gib."""
        host = peak_memory() / GIB
        peak = torch.cuda.max_memory_allocated(self.device) / GIB if self.device.type == "cuda" else host
        return {
            "seconds": self.seconds(),
            "peak_memory_gib": round(peak, 3),
            "peak_host_memory_gib": round(host, 3),
        }


def versions() -> dict[str, str]:
    installed = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {"python": platform.python_version(), **installed}


def _installed(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " cpu"


def available_memory() -> int:
    """Bytes of free host memory."""
    return psutil.virtual_memory().free


def resident_memory() -> int:
    """Bytes of host memory that this process holds now."""
    return psutil.Process().memory_info().rss


def peak_memory() -> int:
    """Bytes of host memory that this process held at most so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows; psutil has no peak elsewhere

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def markdown_table(header: list[str], rows: list[list[Any]]) -> str:
    """Rows as a Markdown table; floats to four significant digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)
