"""Weights -> integers: GPTQ (Frantar et al., arXiv 2210.17323), and rounding to nearest. Pure functions on tensors.

Integers are asymmetric: w = scale (code - zero), with 0 <= code, zero < 2^bits, one scale and one zero for a group of
input columns of each row. Groups are columns 0..g-1, g..2g-1 and so on, in any order of quantization, so that every
kernel for grouped weights can read them; where g does not divide the width, the last group is shorter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from component.solve.linalg import damped_cholesky, raised_diagonal
from utils.errors import RunError

DAMPING = 0.01  # of the Hessian, in its mean diagonal
METRIC_DAMPING = 1e-6  # of the mean diagonal: a second factor may lack directions
ROUNDS = 8  # of rows; after each the others make up for its errors
BLOCK = 128  # columns whose errors reach the columns behind them in one product
LEAST_SCALE = 2.0**-24  # float16 knows no smaller number


class Grid(NamedTuple):
    """What weights are rounded to. bits: of an integer; group_size: columns that share a scale and a zero; act_order:
    whether GPTQ takes the columns with the largest inputs first.
    """

    bits: int
    group_size: int
    act_order: bool = True


class Feedback(NamedTuple):
    """How columns make up for each other's errors, for one Hessian. order: (n,), the columns as they come; factor:
    (n, n) upper triangular, row i says how the error of the i-th of them spreads over those behind it.
    """

    order: Tensor
    factor: Tensor


class Quantized(NamedTuple):
    """codes: (m, n) uint8, scales: (m, groups) float16, zeros: (m, groups) uint8."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def dequantized(self, group_size: int) -> Tensor:
        """(m, n) float64, exact."""
        scales, zeros = (_by_column(t, group_size, self.codes.shape[1]) for t in (self.scales, self.zeros))
        return (self.codes.double() - zeros) * scales


def round_to_nearest(weight: Tensor, grid: Grid, what: str) -> Quantized:
    """Every weight by itself. weight: (m, n). Raises: RunError naming `what` where a scale is beyond float16."""
    weight = weight.double()
    scales, zeros = _grids(weight, grid, what)
    scale, zero = (_by_column(t, grid.group_size, weight.shape[1]) for t in (scales, zeros))
    return Quantized(_codes(weight, scale, zero, bits=grid.bits).byte(), scales.half(), zeros.byte())


def gptq(weight: Tensor, feedback: Feedback, grid: Grid, *, what: str) -> Quantized:
    """Column by column, each one's rounding error made up for by the columns that are still to come.

    Lowers tr(E H E^T), E the error of the weights and H what `feedback` is of. weight: (m, n). With act_order scales
    are those of the weights as given, and otherwise of the weights as they are when their group's turn comes.

    Raises: RunError naming `what` where a scale is beyond float16.
    """
    (bits, group_size, act_order), weight, width = grid, weight.double(), weight.shape[1]
    order, factor = feedback
    left = weight[:, order]
    scales, zeros = _grids(weight, grid, what)
    codes = torch.empty_like(weight)
    # a block holds whole groups: where a group begins, its columns have had all the feedback there is
    block = group_size * max(1, BLOCK // group_size)
    for start in range(0, width, block):
        end = min(start + block, width)
        part, errors = left[:, start:end], torch.empty_like(left[:, start:end])
        for offset, (number, group) in enumerate(zip(*_places(order[start:end], group_size), strict=True)):
            if not act_order and number % group_size == 0:
                scales[:, group], zeros[:, group] = _fitted(part[:, offset : offset + group_size], bits, what)
            scale, zero = scales[:, group], zeros[:, group]
            column, row = part[:, offset], factor[start + offset, start:end]
            code = _codes(column, scale, zero, bits=bits)
            errors[:, offset] = (column - scale * (code - zero)) / row[offset]
            part[:, offset:] -= errors[:, offset, None] * row[offset:]
            codes[:, number] = code
        left[:, end:] -= errors @ factor[start:end, end:]
    return Quantized(codes.byte(), scales.half(), zeros.byte())


def gptq_together(weight: Tensor, feedback: Feedback, metric: Tensor, *, grid: Grid, what: str) -> Quantized:
    """GPTQ of rows whose errors meet again, as those of a first factor do in the second: lowers tr(M E H E^T).

    An eighth of the rows at a time are quantized as by `gptq`, and those still to come make up for their errors as the
    columns do there: W_rest -= M_rest,rest^-1 M_rest,done E_done. Rows that count most come first.

    weight: (m, n); metric: M (m, m), positive semidefinite; the rest as for `gptq`.
    """
    metric, left = metric.double().clone(), weight.double().clone()
    metric.diagonal().add_(METRIC_DAMPING * metric.diagonal().mean() + torch.finfo(metric.dtype).tiny)
    order = metric.diagonal().argsort(descending=True, stable=True)
    parts: list[Quantized] = []
    size = max(1, -(-len(order) // ROUNDS))
    for start in range(0, len(order), size):
        now, rest = order[start : start + size], order[start + size :]
        parts.append(gptq(left[now], feedback, grid, what=what))
        errors = parts[-1].dequantized(grid.group_size) - left[now]
        if len(rest):
            left[rest] -= torch.linalg.solve(metric[rest][:, rest], metric[rest][:, now] @ errors)
    back = order.argsort()
    return Quantized(*(torch.cat(tensors)[back] for tensors in zip(*parts, strict=True)))


def expected_losses(weight: Tensor, feedback: Feedback, grid: Grid, *, what: str) -> Tensor:
    """What `gptq` is to leave of tr(E H E^T), for every row: (m,) float64, the damping of H included.

    The rounding error of a column, before those behind it make up for it, is uniform over a step of the grid: s^2 / 12
    on average, times the variance of its input that the columns behind it do not explain. Arguments as for `gptq`.
    """
    scales, _ = _grids(weight.double(), grid, what)
    steps = _by_column(scales, grid.group_size, weight.shape[1])[:, feedback.order]
    return (steps / feedback.factor.diagonal()).square().sum(1) / 12


def feedback_of(hessian: Tensor, act_order: bool, what: str) -> Feedback:
    """hessian: (n, n), X X^T of the inputs, in any scale and possibly singular; act_order: the largest inputs first.

    Raises: RunError naming `what` where the Hessian is not finite.
    """
    order = torch.arange(len(hessian), device=hessian.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    return Feedback(order, _inverse_factor(hessian.double()[order][:, order], what))


def _inverse_factor(hessian: Tensor, what: str) -> Tensor:
    """The upper triangular R with R^T R = (H + mu I)^-1: row i is how column i's error spreads over those behind it."""
    factor, mu = damped_cholesky(hessian, DAMPING, what)
    inverse = torch.cholesky_inverse(factor)
    upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
    if info.item():  # the inverse of an ill-conditioned matrix may be indefinite by rounding
        with raised_diagonal(hessian, 10 * mu):
            return _inverse_factor(hessian, what)
    return upper


def _places(columns: Tensor, group_size: int) -> tuple[list[int], list[int]]:
    """Numbers of the columns in the weight, and of their groups."""
    return columns.tolist(), (columns // group_size).tolist()


def _by_column(grid: Tensor, group_size: int, width: int) -> Tensor:
    """(m, groups) -> (m, width) float64"""
    return grid.double().repeat_interleave(group_size, dim=1)[:, :width]


def _grids(weight: Tensor, grid: Grid, what: str) -> tuple[Tensor, Tensor]:
    """Scales and zeros of all groups, (m, groups) float64 each."""
    fitted = [_fitted(group, grid.bits, what) for group in weight.split(grid.group_size, dim=1)]
    scales, zeros = (torch.stack(parts, dim=1) for parts in zip(*fitted, strict=True))
    return scales, zeros


def _fitted(group: Tensor, bits: int, what: str) -> tuple[Tensor, Tensor]:
    """The grid from the least to the largest weight of every row, zero included; scales as float16 holds them."""
    low, high = group.amin(dim=1).clamp(max=0), group.amax(dim=1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=LEAST_SCALE).half().double()
    if not torch.isfinite(scale).all():
        raise RunError(f"{what}: weights too large for scales in float16, or not finite")
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def _codes(weight: Tensor, scale: Tensor, zero: Tensor, *, bits: int) -> Tensor:
    return (weight / scale + zero).round().clamp(0, 2**bits - 1)
