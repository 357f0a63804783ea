"""Weights -> integers: GPTQ (Frantar et al., arXiv 2210.17323), and rounding to nearest. Pure functions on tensors.

Integers are asymmetric: w = scale (code - zero), with 0 <= code, zero < 2^bits, one scale and one zero for a group of
input columns of each row. Groups are columns 0..g-1, g..2g-1 and so on, in any order of quantization, so that every
kernel for grouped weights can read them; where g does not divide the width, the last group is shorter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from component.linalg import damped_cholesky, raised_diagonal, solve_right
from utils.errors import RunError

METHODS = ("gptq", "rtn")
DAMPING = 0.01  # of the Hessian, in its mean diagonal
METRIC_DAMPING = 1e-6  # of the mean diagonal: a second factor may lack directions
ROUNDS = 8  # of rows; after each the others make up for its errors
BLOCK = 128  # columns whose errors reach the columns behind them in one product
LEAST_SCALE = 2.0**-24  # float16 knows no smaller number


class Quantized(NamedTuple):
    """codes: (m, n) uint8, scales: (m, groups) float16, zeros: (m, groups) uint8."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def dequantized(self, group_size: int) -> Tensor:
        """(m, n) float64, exact."""
        scales, zeros = (_by_column(t, group_size, self.codes.shape[1]) for t in (self.scales, self.zeros))
        return (self.codes.double() - zeros) * scales


def round_to_nearest(weight: Tensor, bits: int, group_size: int, what: str) -> Quantized:
    """Every weight by itself. weight: (m, n). Raises: RunError naming `what` where a scale is beyond float16."""
    weight = weight.double()
    scales, zeros = _grids(weight, bits, group_size, what)
    scale, zero = (_by_column(t, group_size, weight.shape[1]) for t in (scales, zeros))
    return Quantized(_codes(weight, scale, zero, bits).byte(), scales.half(), zeros.byte())


def gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int, act_order: bool, what: str) -> Quantized:
    """Column by column, each one's rounding error made up for by the columns that are still to come.

    Lowers tr(E H E^T), E the error of the weights. weight: (m, n), hessian: (n, n), X X^T of the inputs, in any scale
    and possibly singular. act_order takes the columns with the largest inputs first; scales are then those of the
    weights as given, and otherwise of the weights as they are when their group's turn comes.

    Raises: RunError naming `what` where the Hessian is not finite or a scale is beyond float16.
    """
    weight, width = weight.double(), weight.shape[1]
    order = torch.arange(width, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    feedback = _inverse_factor(hessian.double()[order][:, order], what)
    left = weight[:, order]
    scales, zeros = _grids(weight, bits, group_size, what)
    codes = torch.empty_like(weight)
    # a block holds whole groups: where a group begins, its columns have had all the feedback there is
    block = group_size * max(1, BLOCK // group_size)
    for start in range(0, width, block):
        end = min(start + block, width)
        part, errors = left[:, start:end], torch.empty_like(left[:, start:end])
        for offset, (number, group) in enumerate(zip(*_places(order[start:end], group_size), strict=True)):
            if not act_order and number % group_size == 0:
                scales[:, group], zeros[:, group] = _grid(part[:, offset : offset + group_size], bits, what)
            scale, zero = scales[:, group], zeros[:, group]
            column, row = part[:, offset], feedback[start + offset, start:end]
            code = _codes(column, scale, zero, bits)
            errors[:, offset] = (column - scale * (code - zero)) / row[offset]
            part[:, offset:] -= errors[:, offset, None] * row[offset:]
            codes[:, number] = code
        left[:, end:] -= errors @ feedback[start:end, end:]
    return Quantized(codes.byte(), scales.half(), zeros.byte())


def gptq_together(
    weight: Tensor, hessian: Tensor, metric: Tensor, bits: int, group_size: int, act_order: bool, what: str
) -> Quantized:
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
        parts.append(gptq(left[now], hessian, bits, group_size, act_order, what))
        errors = parts[-1].dequantized(group_size) - left[now]
        if len(rest):
            left[rest] -= torch.linalg.solve(metric[rest][:, rest], metric[rest][:, now] @ errors)
    back = order.argsort()
    return Quantized(*(torch.cat(tensors)[back] for tensors in zip(*parts, strict=True)))


def refit(outer: Tensor, inner: Tensor, rounded: Tensor, gram: Tensor, what: str) -> Tensor:
    """The second factor of a product, once the first one has been rounded: (m, r) float64.

    The C' least in |C' Q X - C P X|^2 + mu |C' - C|^2, with C: (m, r) `outer`, P: (r, n) `inner`, Q: (r, n) `rounded`
    and gram: (n, n) X X^T; mu is the damping of Q X X^T Q^T.

    Raises: RunError naming `what` where the gram is not finite.
    """
    outer, inner, rounded, gram = (t.double() for t in (outer, inner, rounded, gram))
    factor, _ = damped_cholesky(rounded @ gram @ rounded.T, DAMPING, what)
    return outer + solve_right(outer @ (inner - rounded) @ gram @ rounded.T, factor)


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


def _grids(weight: Tensor, bits: int, group_size: int, what: str) -> tuple[Tensor, Tensor]:
    """Scales and zeros of all groups, (m, groups) float64 each."""
    grids = [_grid(group, bits, what) for group in weight.split(group_size, dim=1)]
    scales, zeros = (torch.stack(parts, dim=1) for parts in zip(*grids, strict=True))
    return scales, zeros


def _grid(group: Tensor, bits: int, what: str) -> tuple[Tensor, Tensor]:
    """The grid from the least to the largest weight of every row, zero included; scales as float16 holds them."""
    low, high = group.amin(dim=1).clamp(max=0), group.amax(dim=1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=LEAST_SCALE).half().double()
    if not torch.isfinite(scale).all():
        raise RunError(f"{what}: weights too large for scales in float16, or not finite")
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def _codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (weight / scale + zero).round().clamp(0, 2**bits - 1)
