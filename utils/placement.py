"""Where tensors that grow with the number of samples live: on the card, in host memory, or in files mapped into it."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.report import GIB

CARD_SHARE = 0.25  # of the card's free memory

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]  # shape, dtype -> a tensor with any values


def home(size: int, device: torch.device) -> torch.device:
    """The device itself, where it is a card that `size` bytes take no more than a quarter of; else the host."""
    free = free_bytes(device)
    return device if free is not None and stays_on_card(size, free) else torch.device("cpu")


def stays_on_card(size: int, free: int) -> bool:
    return size < CARD_SHARE * free


def wake(device: torch.device) -> None:
    """Let a card's libraries be loaded: the host memory that they take can be seen then, and the first layer is not
    what waits for them.
    """
    if device.type != "cuda":
        return
    for dtype in (torch.float16, torch.float32, torch.float64):
        product = torch.eye(64, dtype=dtype, device=device) @ torch.eye(64, dtype=dtype, device=device)
    torch.linalg.eigh(torch.linalg.cholesky_ex(product).L)


def free_bytes(device: torch.device) -> int | None:
    """Of a card, with what torch keeps of it for tensors to come; None where the device is none."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@dataclass(frozen=True)
class Shelf:
    """Room for hidden states. limit: bytes in host memory, None for any; what takes more is mapped from files.

    folder: where these files are made. They have no name there, so that they go with the process, however it ends.
    """

    limit: int | None = None
    folder: Path | None = None

    @classmethod
    def of(cls, host_memory_gib: float | None, folder: Path) -> "Shelf":
        """With --host_memory's GiB as limit."""
        if host_memory_gib is None or host_memory_gib == float("inf"):
            return cls(None, folder)
        return cls(int(host_memory_gib * GIB), folder)

    def room(self, size: int, device: torch.device) -> Empty:
        """How to make tensors that take `size` bytes together."""
        place = home(size, device)
        if place.type == "cpu" and self.limit is not None and size > self.limit:
            return self._mapped
        return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=place)

    def _mapped(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Raises: OSError where the disk has no room for it."""
        numbers = torch.Size(shape).numel()
        descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=".hidden-states-")
        try:
            if hasattr(os, "posix_fallocate"):  # writing to a mapped hole on a full disk would end the process
                os.posix_fallocate(descriptor, 0, max(1, numbers * dtype.itemsize))
            return torch.from_file(name, shared=True, size=numbers, dtype=dtype).reshape(shape)
        finally:
            os.close(descriptor)
            Path(name).unlink()
