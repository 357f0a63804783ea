"""Rows of a comparison: ways to compute the same thing, checked against float64 and timed against each other."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from component.bench import timing
from component.bench.timing import Limits
from utils.errors import RunError

FEW_TOKENS = 64  # up to here a call is short: it is captured, over several copies of the weights
CHECKED_TOKENS = 64  # compared with float64, half from either end
# error of the output against float64, relative; a pivoted layer's is about four times the dense one's
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Row:
    """One way: y = forward(x) for x: (tokens, d_in), and the same in float64 from the same weights.

    Where it can't be run here, `refused` says why, and the rest means nothing.
    """

    name: str
    tensors: tuple[Tensor, ...] = ()  # what it stores
    forward: Callable[[Tensor], Tensor] = torch.clone
    expected: Callable[[Tensor], Tensor] = torch.clone
    flops: int = 0  # per token
    has_gradients: bool = True
    foreign: bool = False  # another library's: what goes wrong there is its result
    refused: str = ""

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


Maker = Callable[[], Row]  # a row with fresh random weights at every call


class Case(NamedTuple):
    """What a comparison is about: `labels` go into every result."""

    labels: dict[str, Any]
    d_out: int
    d_in: int
    tokens: int
    dtype: torch.dtype
    device: torch.device

    @property
    def described(self) -> dict[str, Any]:
        return {**self.labels, "tokens": self.tokens, "dtype": str(self.dtype).removeprefix("torch.")}

    def inputs(self) -> Tensor:
        return torch.randn(self.tokens, self.d_in, device=self.device, dtype=self.dtype)


@torch.no_grad()
def compare(case: Case, makers: Sequence[Maker], limits: Limits, *, seconds: float) -> list[dict[str, Any]]:
    """Check and time every row on the same inputs, in turn; one result each, speedups over the first.

    Up to 64 tokens one CUDA graph runs several copies of a row, together larger than the cache, and a result is the
    time of one.

    Raises: RunError where a row's output is wrong, unless it is foreign.
    """
    x = case.inputs()
    checked = [_check(make(), x, case.d_out) for make in makers]
    rows, errors = [row for row, _ in checked], {row.name: error for row, error in checked}
    able = {row.name: row for row in rows if not row.refused}
    few = case.tokens <= FEW_TOKENS
    copies = timing.copies_beyond_cache(min(row.stored_bytes for row in able.values()), case.device) if few else 1
    calls: dict[str, timing.Call] = {}
    for make, row in zip(makers, rows, strict=True):
        if not row.refused:
            call = partial(_run_all, [row, *(make() for _ in range(copies - 1))], x)
            calls[row.name] = timing.as_graph(call, case.device) if few else call
    found = timing.interleaved_medians(calls, case.device, seconds)
    peaks = {name: timing.peak_bytes(partial(row.forward, x), case.device) for name, row in able.items()}
    results = []
    for row in rows:
        result = {**case.described, "row": row.name}
        if row.refused:
            results.append({**result, "refused": row.refused})
            continue
        taken = found[row.name] / copies
        moved = row.stored_bytes + x.element_size() * case.tokens * (case.d_in + case.d_out)
        results.append(
            {
                **result,
                "seconds": taken,
                "speedup": found[rows[0].name] / found[row.name],
                "tflops": row.flops * case.tokens / taken / 1e12,
                "gbs": moved / taken / 1e9,
                "of_limit": limits.floor(row.flops * case.tokens, moved) / taken,
                "weight_bytes": row.stored_bytes,
                "memory": row.stored_bytes / rows[0].stored_bytes,
                "peak_bytes": peaks[row.name],
                "error": errors[row.name],
            }
        )
    return results


def _check(row: Row, x: Tensor, d_out: int) -> tuple[Row, float]:
    """The row and its error; a foreign one that fails or is wrong comes back refused."""
    if row.refused:
        return row, math.nan
    try:
        return row, output_error(row, x, d_out)
    except (RuntimeError, RunError) as error:
        if not row.foreign:
            raise
        return replace(row, refused=f"failed: {str(error).strip().splitlines()[0]}"), math.nan


def output_error(row: Row, x: Tensor, d_out: int) -> float:
    """Error of the first and last tokens' outputs against float64; x: (tokens, d_in).

    The memory that outputs take is filled with NaN first.

    Raises: RunError where a number is not finite, or the error is above what rounding explains.
    """
    tokens = len(x)
    timing.poison(x.device, x.dtype, (tokens, d_out), *((tokens, len(t)) for t in row.tensors if t.dim() == 2))
    y = row.forward(x)
    if not torch.isfinite(y).all():
        raise RunError(f"{row.name}: an output of {tokens} x {d_out} holds numbers that are not finite")
    half = CHECKED_TOKENS // 2
    ends = torch.arange(tokens, device=x.device)
    ends = ends if tokens <= CHECKED_TOKENS else torch.cat([ends[:half], ends[-half:]])
    expected = row.expected(x[ends].double())
    error = ((y[ends].double() - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE[x.dtype]:
        raise RunError(f"{row.name}: relative error {error:.1e} at {tokens} x {d_out}, above {TOLERANCE[x.dtype]:.0e}")
    return error


def _run_all(rows: list[Row], x: Tensor) -> None:
    for row in rows:
        row.forward(x)


def compare_training(case: Case, makers: Sequence[Maker], seconds: float) -> list[dict[str, Any]]:
    """Time forward and backward together, with gradients of inputs and weights, for the rows that have them."""
    x = case.inputs().requires_grad_()
    upstream = torch.randn(case.tokens, case.d_out, device=case.device, dtype=case.dtype)
    rows = [row for make in makers if not (row := make()).refused and row.has_gradients]
    calls = {row.name: _forward_backward(row, x, upstream) for row in rows}
    found = timing.interleaved_medians(calls, case.device, seconds)
    first = found[rows[0].name]
    return [
        {**case.described, "row": name, "seconds": taken, "speedup": first / taken} for name, taken in found.items()
    ]


def _forward_backward(row: Row, x: Tensor, upstream: Tensor) -> timing.Call:
    wanted = [x, *(t.requires_grad_() for t in row.tensors if t.is_floating_point())]

    def call() -> None:
        with torch.enable_grad():
            torch.autograd.grad(row.forward(x), wanted, upstream)

    return call
