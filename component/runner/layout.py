"""What the functions of the runner hand to each other: where outputs lie, and what attention needs. Plain data."""

from typing import NamedTuple

import torch
from torch import Tensor

SMALL_BATCH = 32  # rows up to which a product is bound by reading its weights


class Run(NamedTuple):
    """Output j of a module is column j + low of z where j < split, else j + high."""

    split: int
    low: int
    high: int


class Layout(NamedTuple):
    """Where a stack's outputs lie in z: (tokens, width)."""

    sizes: tuple[int, ...]  # d_out of each module
    runs: tuple[Run, ...] | None  # one for each module, or None where only `columns` tell
    columns: Tensor  # (sum of sizes,) int32: output j of all modules, one after another, is z[:, columns[j]]
    bias: Tensor | None  # (sum of sizes,), in the modules' own order

    @property
    def starts(self) -> tuple[int, ...] | None:
        """First column of each module if all lie there whole and in order."""
        if self.runs is None or any(run.split < size for run, size in zip(self.runs, self.sizes, strict=True)):
            return None
        return tuple(run.low for run in self.runs)


class Coefficients(NamedTuple):
    """z[:, column : column + n] = z[:, start : start + k] weight^T, weight: (n, k)."""

    weight: Tensor
    start: int
    column: int


class Scratch(NamedTuple):
    """Where programs that share a result meet; one at a time uses it."""

    partial: Tensor  # float32
    arrivals: Tensor  # int32 zeros, left as zeros

    @classmethod
    def on(cls, device: torch.device) -> "Scratch":
        return cls(torch.empty(1 << 20, device=device), torch.zeros(1024, dtype=torch.int32, device=device))


class Heads(NamedTuple):
    """How many heads of what size; norms are RMSNorm weights (head_dim,) of queries and keys, or None."""

    queries: int
    keys: int
    size: int
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    eps: float = 0.0


class AttentionState(NamedTuple):
    """What one layer's attention reads beside the outputs of q, k and v."""

    heads: Heads
    rotary: tuple[Tensor, Tensor]  # cos and sin, (positions, size), float32; angles of both halves are the same
    position: Tensor  # (1,) int64, that of the first token
    cache: tuple[Tensor, Tensor]  # keys and values, (batch, key heads, max_length, size)
    scale: float  # of a query times a key
