"""Several processes, one per card, that compress one model together: started by torchrun, alone without it.

Every process has the whole model and runs a share of the calibration windows through it. What the solvers see are sums
over windows, so that adding up the moments of all is all there is to it; the linears of a group are then dealt out, and
each one's factors go to everybody. The processes thus hold the same layers, bit by bit, and the first one writes them.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from component.solve.moments import Moments
from utils.errors import RunError, UsageError

# a process may wait for long while the first one profiles; torchrun ends them all as soon as one is dead
PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Team:
    """One process's view of all. Alone, nothing is exchanged."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """(begin, end) of this process's part of so many windows. Raises: UsageError where somebody would get none."""
        if count < self.size:
            raise UsageError(f"{self.size} processes for {count} windows: start at most {count}")
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def add_up(self, moments: Moments, device: torch.device) -> None:
        """Replace the moments by their sums over all processes, in place.

        Windows count from the first one on, so that the first process has every moment that anybody has.
        """
        if self.size == 1:
            return
        names = [field.name for field in fields(moments)]
        shapes = self.agreed([None if (t := getattr(moments, name)) is None else tuple(t.shape) for name in names])
        for name, shape in zip(names, shapes, strict=True):
            if shape is not None:
                mine = getattr(moments, name)
                total = torch.zeros(shape, dtype=torch.float64, device=device) if mine is None else mine.contiguous()
                with _one_line():
                    dist.all_reduce(total)
                setattr(moments, name, total)

    def agreed(self, value: Any) -> Any:
        """What the first process has; any value that pickles."""
        return self.handed_round(value, 0)

    def handed_round(self, value: Any, owner: int) -> Any:
        """What process number `owner` has; the others' is not looked at."""
        if self.size == 1:
            return value
        box = [value]
        with _one_line():
            dist.broadcast_object_list(box, src=owner)
        return box[0]

    def factors(self, mine: tuple[Tensor, Tensor] | None, owner: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The factors that process number `owner` found, float64, on the device; the others give None."""
        shapes = self.handed_round(mine and [tuple(factor.shape) for factor in mine], owner)
        if mine is None:
            received = [torch.empty(shape, dtype=torch.float64, device=device) for shape in shapes]
        else:
            received = [factor.double().contiguous() for factor in mine]
        for factor in received if self.size > 1 else ():
            with _one_line():
                dist.broadcast(factor, src=owner)
        u, v = received
        return u, v

    def wait(self) -> None:
        """Until all processes are here."""
        self.agreed(None)


@contextlib.contextmanager
def team_for(device: torch.device) -> Iterator[tuple[Team, torch.device]]:
    """The team that torchrun's environment describes, and this process's device; Team() without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team(), device
        return
    if os.environ.get("OMP_NUM_THREADS") == "1":  # what torchrun sets where nothing is said: most cores would idle
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", size))))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    with _one_line():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Both backends say with a RuntimeError of many lines that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"another process is gone ({reason}): the same command with --resume goes on") from error
