"""GPTQ of the two factors of a product, each made for what the other has become. Pure functions on tensors."""

import torch
from torch import Tensor

from component.quantize.gptq import (
    DAMPING,
    METRIC_DAMPING,
    Feedback,
    Grid,
    Quantized,
    expected_losses,
    feedback_of,
    gptq,
    gptq_together,
)
from component.solve.linalg import damped_cholesky, solve_right
from component.solve.reconstruction import EXACT_DAMPING

# Over both factors: in the second one the first factor makes up for how the second was rounded. Where that has 8 bits
# there is nothing to make up for: on three modules of SmolLM2 the errors were the same to four digits.
SWEEPS = {4: 2, 8: 1}


def round_product(
    inner: Tensor,
    outer: Tensor,
    target: Tensor,
    *,
    gram: Tensor,
    feedback: Feedback,
    grids: tuple[Grid, Grid],
    what: str,
    pivots: bool,
) -> tuple[Quantized, Quantized]:
    """Integers for P and C that lower |O P X - Y|^2 with O = [I; C] where P holds pivot rows, and else O = C.

    In turn P is moved to the least squares solution for C as it is, and rounded in the metric O^T O in which its errors
    reach the output; then C is moved to that for the rounded P, and rounded. The best of the sweeps is taken.

    inner: P (r, n); outer: C (m, r), without the rows of the pivots; target: Y X^T, of all rows of O; gram: X X^T
    (n, n), float64; feedback: of gram; grids: of P and of C.

    Raises: RunError naming `what` where a moment is not finite or a scale is beyond float16.
    """
    inner, outer, rank = inner.double(), outer.double(), len(inner)
    identity = torch.eye(rank if pivots else 0, rank, dtype=outer.dtype, device=outer.device)
    sweeps: list[tuple[float, Quantized, Quantized]] = []
    for _ in range(SWEEPS[grids[1].bits]):
        whole = torch.cat([identity, outer])
        moved = refit_inner(inner, whole, target, gram=gram, what=what)
        named = f"{what}, first factor"
        first = gptq_together(moved, feedback, whole.T @ whole, grid=grids[0], what=named)
        rounded = first.dequantized(grids[0].group_size)
        outer = refit_outer(outer, rounded, target[len(identity) :], gram=gram, what=what)
        behind = feedback_of(rounded @ gram @ rounded.T, grids[1].act_order, what)
        second = gptq(outer, behind, grids[1], what=f"{what}, second factor")
        outer = second.dequantized(grids[1].group_size)
        product = torch.cat([rounded, outer @ rounded]) if pivots else outer @ rounded
        sweeps.append((((product @ gram - 2 * target) * product).sum().item(), first, second))
    _, first, second = min(sweeps, key=lambda sweep: sweep[0])
    return first, second


def refit_inner(inner: Tensor, whole: Tensor, target: Tensor, *, gram: Tensor, what: str) -> Tensor:
    """The P' least in |O P' X - Y|^2 + mu |O (P' - P)|^2, with the ridge of exact M: (r, n).

    inner: P; whole: O (d_out, r); target: Y X^T (d_out, n).
    """
    inputs, _ = damped_cholesky(gram, EXACT_DAMPING, what)
    metric, _ = damped_cholesky(whole.T @ whole, METRIC_DAMPING, what)
    missing = whole.T @ (target - whole @ inner @ gram)
    return inner + solve_right(torch.cholesky_solve(missing, metric), inputs)


def refit_outer(outer: Tensor, rounded: Tensor, target: Tensor, *, gram: Tensor, what: str) -> Tensor:
    """The C' least in |C' Q X - Y|^2 + mu |C' - C|^2, with Q: (r, n) `rounded` and mu the damping of Q X X^T Q^T.

    outer: C (m, r); target: Y X^T (m, n).
    """
    hessian = rounded @ gram @ rounded.T
    factor, _ = damped_cholesky(hessian, DAMPING, what)
    return outer + solve_right(target @ rounded.T - outer @ hessian, factor)


def refit(weight: Tensor, target: Tensor, gram: Tensor, *, what: str) -> Tensor:
    """The W' least in |W' X - Y|^2 + mu |W' - W|^2, with the ridge of exact M. weight: (m, n); target: Y X^T."""
    weight = weight.double()
    factor, _ = damped_cholesky(gram, EXACT_DAMPING, what)
    return weight + solve_right(target - weight @ gram, factor)


def expected_loss(
    inner: Tensor,
    outer: Tensor,
    *,
    gram: Tensor,
    feedback: Feedback,
    grids: tuple[Grid, Grid],
    what: str,
    pivots: bool,
) -> float:
    """What one sweep of `round_product` is to leave of |O P X - Y|^2, from the grids alone: see `expected_losses`."""
    inner, outer, rank = inner.double(), outer.double(), len(inner)
    metric = outer.T @ outer + torch.eye(rank, dtype=outer.dtype, device=outer.device) * pivots
    # of every row's error, what the rows behind it can't make up for
    order, factor = feedback_of(metric, True, what)
    counts = factor.diagonal()[order.argsort()].square().reciprocal()
    first = expected_losses(inner, feedback, grids[0], what=what) @ counts
    behind = feedback_of(inner @ gram @ inner.T, grids[1].act_order, what)
    return (first + expected_losses(outer, behind, grids[1], what=what).sum()).item()
