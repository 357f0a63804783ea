"""PIFA: a rank-r matrix as r of its own rows and the coefficients of the others (arXiv 2501.19090, Sec. 3)."""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from utils.errors import RunError

log = logging.getLogger("pifa")

RANK_TOLERANCE = 1e-10  # smallest over largest, below which a direction counts as absent
LARGEST_COEFFICIENT = 1.2  # swaps go on until no coefficient is larger; small ones round well
MOST_SWAPS_PER_RANK = 4  # every swap multiplies a determinant by more than 1.2, so the bound is never near


class Pivots(NamedTuple):
    """W' = [pivot_rows; coefficients pivot_rows], rows put in order by perm."""

    pivot_rows: Tensor  # W_p: (r, d_in)
    coefficients: Tensor  # C: (d_out - r, r)
    perm: Tensor  # (d_out,) int32: row j of W' is row perm[j] of the stack


def pivot(u: Tensor, v: Tensor, what: str = "module") -> Pivots:
    """Pivoting factorization of W' = u v in float64, on the factor u alone.

    W'[I] has rank r exactly where u[I] is invertible, and C = u[J] u[I]^-1 then gives all other rows. I is chosen
    by LU with row pivoting, then improved by swaps until |C| <= 1.2; it is sorted, as are the others.

    u: (d_out, r), v: (r, d_in), any float dtype. The rank is never raised; where u v has a lower one, the result
    has the lower one too. Returns float64.

    Raises: RunError naming `what` where a factor is not finite.
    """
    u, v = u.double(), v.double()
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise RunError(f"{what}: its low-rank factors are not finite")
    if not _has_full_rank(u, v):
        u, v = _reduce_rank(u, v, what)
    rank = u.shape[1]
    rows = _swap(*_lu_rows(u), what=what)
    chosen = rows[:rank].sort().values
    others = rows[rank:].sort().values
    # solved afresh for the sorted rows: swaps have added rounding to the running coefficients
    coefficients = torch.linalg.solve(u[chosen], u[others], left=False)
    perm = torch.empty_like(rows)
    perm[torch.cat([chosen, others])] = torch.arange(len(rows), device=rows.device)
    return Pivots(u[chosen] @ v, coefficients, perm.int())


def _has_full_rank(u: Tensor, v: Tensor) -> bool:
    """A cheap screen on u R^T with v^T = Q R: its LU diagonal collapses where a direction is absent."""
    diagonal = torch.linalg.lu_factor_ex(u @ torch.linalg.qr(v.T, mode="r").R.T).LU.diagonal().abs()
    return bool(diagonal.min() > RANK_TOLERANCE * diagonal.max())


def _reduce_rank(u: Tensor, v: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """The same product with as many columns as it has rank, by an SVD of its r x r core."""
    q_u, r_u = torch.linalg.qr(u)
    q_v, r_v = torch.linalg.qr(v.T)
    left, sigma, right = torch.linalg.svd(r_u @ r_v.T)
    rank = max(int((sigma > RANK_TOLERANCE * sigma[0]).sum()), 1)
    log.warning("%s: its numerical rank is %d, not %d; stored at that", what, rank, len(sigma))
    return q_u @ left[:, :rank], sigma[:rank, None] * (right[:rank] @ q_v.T)


def _lu_rows(u: Tensor) -> tuple[Tensor, Tensor]:
    """All row indices, those of the pivots first, and the coefficients of the rest."""
    rank = u.shape[1]
    packed, swaps = torch.linalg.lu_factor(u)
    rows = list(range(len(u)))
    for i, j in enumerate((swaps - 1).tolist()):
        rows[i], rows[j] = rows[j], rows[i]
    lower = packed.tril(-1)
    # L = [L1; L2] with a unit diagonal: C = L2 L1^-1 by one triangular solve
    coefficients = torch.linalg.solve_triangular(
        lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True
    )
    return torch.tensor(rows, device=u.device), coefficients


def _swap(rows: Tensor, coefficients: Tensor, what: str) -> Tensor:
    """Exchange a pivot with another row while a coefficient exceeds the limit (maxvol); returns the rows."""
    rank = coefficients.shape[1]
    for _ in range(MOST_SWAPS_PER_RANK * rank if coefficients.numel() else 0):
        i, j = divmod(int(coefficients.abs().argmax()), rank)
        peak = coefficients[i, j].clone()
        if peak.abs() <= LARGEST_COEFFICIENT:
            return rows
        row, column = coefficients[i].clone(), coefficients[:, j].clone()
        coefficients = coefficients - torch.outer(column, row / peak)
        coefficients[i], coefficients[:, j] = -row / peak, column / peak
        coefficients[i, j] = 1 / peak
        rows[[j, rank + i]] = rows[[rank + i, j]]
    if coefficients.numel():
        log.warning("%s: a coefficient of %.2f is left", what, coefficients.abs().max())
    return rows
