"""What the runner's Triton kernels share: how they are launched, how they wait, how they pick numbers.

Import it only where there is a GPU. On Hopper, kernels for few tokens are launched before the kernel ahead of them has
ended: each first asks for what does not depend on it (weights, indices), then waits. `gdc_wait` is met by every program
before it reads an activation or writes anything, so what a kernel sees is what it would see in plain stream order.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from component.runner.layout import SMALL_BATCH

AN_H100 = 132  # multiprocessors


def launch_options(tokens: int) -> dict[str, Any]:
    """Those that overlap a kernel's start with the end of the one before, where tokens are few."""
    early = tokens <= SMALL_BATCH and is_hopper(torch.cuda.is_available())
    return {"PDL": True, "launch_pdl": True} if early else {"PDL": False}


@functools.cache
def is_hopper(gpu: bool) -> bool:
    """Hopper or later, and a Triton that knows of early launches."""
    return gpu and torch.cuda.get_device_capability()[0] >= 9 and hasattr(tl.extra.cuda, "gdc_wait")


@functools.cache
def multiprocessors(gpu: bool) -> int:
    return torch.cuda.get_device_properties().multi_processor_count if gpu else AN_H100


def precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def start_in_turn(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the one before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def pick(start, columns, mask, GATHER: tl.constexpr):
    """(rows, columns) numbers in float32; start: (rows,) pointers, columns: (columns,), mask: (rows, columns)."""
    if GATHER:
        # columns first: the compiler gives neighbouring threads the first dimension, and neighbouring columns lie close
        y = tl.trans(tl.load(start[None, :] + columns[:, None], mask=tl.trans(mask), other=0.0))
    else:
        y = tl.load(start[:, None] + columns[None, :], mask=mask, other=0.0)
    return y.to(tl.float32)
