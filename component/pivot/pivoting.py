"""PIFA: a rank-r matrix as r of its own rows and the coefficients of the others (arXiv 2501.19090, Sec. 3)."""

import logging
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from utils.errors import RunError

log = logging.getLogger("pifa")

RANK_TOLERANCE = 1e-10  # smallest over largest, below which a direction counts as absent
LARGEST_COEFFICIENT = 1.2  # swaps go on until no coefficient is larger; small ones round well
MOST_SWAPS_PER_RANK = 4  # every swap multiplies a determinant by more than 1.2, so the bound is never near
LARGEST_SHARED_COEFFICIENT = 8.0  # of pivots that several matrices share
LARGEST_IN_FLOAT32 = 1.19  # whose rounding must not decide on which side of 1.2 a coefficient lies
# coefficients before any swap, above which there are not enough digits left for swaps to go on from
HOPELESS, HOPELESS_IN_FLOAT32 = 1e6, 1e2
GRAM_RESOLUTION = 1e-11  # eigenvalues of a float64 Gram matrix, relative to its trace, that no rounding of it explains
STAY = (0.0, 0, 0)  # no swap


class Pivots(NamedTuple):
    """W' = [pivot_rows; coefficients pivot_rows], rows put in order by perm."""

    pivot_rows: Tensor  # W_p: (r, d_in)
    coefficients: Tensor  # C: (d_out - r, r)
    perm: Tensor  # (d_out,) int32: row j of W' is row perm[j] of the stack


def pivot(u: Tensor, v: Tensor, what: str = "module") -> Pivots:
    """Pivoting factorization of W' = u v in float64, on the factor u alone.

    W'[I] has rank r exactly where u[I] is invertible, and C = u[J] u[I]^-1 then gives all other rows. I is chosen
    by LU with row pivoting, then improved by swaps until |C| <= 1.2; it is sorted, as are the others. The choice is
    made in float32 and kept where float64 proves it good; else it is made in float64.

    u: (d_out, r), v: (r, d_in), any float dtype. The rank is never raised; where u v has a lower one, the result
    has the lower one too. Returns float64.

    Raises: RunError naming `what` where a factor is not finite.
    """
    u, v = _in_double(u, v, what)
    rows, coefficients = _lu_rows(u.float())
    if _largest(coefficients) < HOPELESS_IN_FLOAT32:
        pivots = _improved(u, v, rows, coefficients=coefficients, limit=LARGEST_IN_FLOAT32, what=what)
        if _largest(pivots.coefficients) <= LARGEST_COEFFICIENT and surely_full_rank(pivots):
            return pivots
    u, v = _full_rank(u, v, what)
    rows, coefficients = _lu_rows(u)
    return _improved(u, v, rows, coefficients=coefficients, limit=LARGEST_COEFFICIENT, what=what)


def _improved(u: Tensor, v: Tensor, rows: Tensor, *, coefficients: Tensor, limit: float, what: str) -> Pivots:
    rows = _swap(rows, [coefficients], limit=limit, what=what)
    return _pivots_of(u, v, rows, stretches=_stretches([u.shape[1]], len(u)))


def pivot_together(factors: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]) -> list[Pivots]:
    """Pivots of matrices with equally many rows, chosen so that all of them have the same perm.

    Where ranks differ, the pivots of a matrix are among those of every matrix with a higher rank: the order
    [pivots of all | pivots of the higher ranks only | others] then is pivots first for each. Rows are chosen one by
    one for the largest product of their distances from the rows chosen before, over the matrices, and improved by
    swaps that raise the product of the determinants. Coefficients come out larger than each matrix alone would have
    them; where they exceed 8, or the matrices have no common pivots, each gets its own, and its own perm.

    factors: (u, v) of each, as for `pivot`. Raises: RunError naming a matrix whose factors are not finite.
    """
    if len(factors) == 1:
        return [pivot(*factors[0], names[0])]
    pairs = [_in_double(u, v, name) for (u, v), name in zip(factors, names, strict=True)]
    together = _in_common(pairs, names)
    if not (together and all(map(surely_full_rank, together))):
        pairs = [_full_rank(u, v, name) for (u, v), name in zip(pairs, names, strict=True)]
        together = _in_common(pairs, names)
    if together:
        return together
    log.warning("%s: no good pivots in common, each has its own", " and ".join(names))
    return [pivot(u, v, name) for (u, v), name in zip(pairs, names, strict=True)]


def _in_common(pairs: list[tuple[Tensor, Tensor]], names: Sequence[str]) -> list[Pivots] | None:
    """Pivots in one order with coefficients up to 8, or None."""
    us = [u for u, _ in pairs]
    ranks = [u.shape[1] for u in us]
    rows = common_rows(us)
    coefficients = [coefficients_of(u, rows) for u in us]
    if not all(_largest(c) < HOPELESS for c in coefficients):
        return None
    rows = _swap(rows, coefficients, limit=LARGEST_COEFFICIENT, what=" and ".join(names))
    together = [_pivots_of(u, v, rows, stretches=_stretches(ranks, len(rows))) for u, v in pairs]
    good = all(_largest(p.coefficients) <= LARGEST_SHARED_COEFFICIENT for p in together)
    return together if good else None


def _in_double(u: Tensor, v: Tensor, what: str) -> tuple[Tensor, Tensor]:
    u, v = u.double(), v.double()
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise RunError(f"{what}: its low-rank factors are not finite")
    return u, v


def surely_full_rank(pivots: Pivots) -> bool:
    """Whether a Cholesky factorization proves that W' has as many directions above RANK_TOLERANCE as pivots.

    It exists only where all eigenvalues of W_p W_p^T, the squares of W_p's singular values, are above what is taken
    off. W' has no smaller singular value than W_p, and ||W'||^2 <= (1 + ||C||_F^2) ||W_p||_F^2. False proves nothing:
    a Gram matrix shows directions down to 3e-6 of the whole only.
    """
    gram = pivots.pivot_rows @ pivots.pivot_rows.T
    absent = RANK_TOLERANCE**2 * (1 + pivots.coefficients.square().sum().item())
    gram.diagonal().sub_(max(absent, GRAM_RESOLUTION) * gram.trace().item())
    factor, info = torch.linalg.cholesky_ex(gram)
    return info.item() == 0 and bool(torch.isfinite(factor).all())


def _full_rank(u: Tensor, v: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """The factors, with as many columns as their product has rank."""
    return (u, v) if _has_full_rank(u, v) else _reduce_rank(u, v, what)


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
    packed, swaps, _ = torch.linalg.lu_factor_ex(u)
    rows = list(range(len(u)))
    for i, j in enumerate((swaps - 1).tolist()):
        rows[i], rows[j] = rows[j], rows[i]
    lower = packed.tril(-1)
    # L = [L1; L2] with a unit diagonal: C = L2 L1^-1 by one triangular solve
    coefficients = torch.linalg.solve_triangular(
        lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True
    )
    return torch.tensor(rows, device=u.device), coefficients


def common_rows(us: list[Tensor]) -> Tensor:
    """All row indices, pivots first, chosen greedily for all matrices that have not had their rank yet.

    Row-pivoted Gram-Schmidt in each column space, in float32: it only chooses.
    """
    bases = [torch.linalg.qr(u).Q.float() for u in us]
    directions = [torch.zeros(b.shape[1], b.shape[1], device=b.device) for b in bases]
    distances = [b.square().sum(dim=1) for b in bases]
    free = torch.ones_like(distances[0])
    rows = torch.empty(len(free), dtype=torch.int64, device=free.device)
    highest = max(len(d) for d in directions)
    for step in range(highest):
        score = free.clone()
        for distance, span in zip(distances, directions, strict=True):
            if step < len(span):
                score *= distance
        rows[step] = row = torch.where(free > 0, score, -1).argmax()
        free[row] = 0
        for basis, distance, span in zip(bases, distances, directions, strict=True):
            if step < len(span):
                direction = basis[row]
                for _ in range(2):  # once is not orthogonal enough
                    direction = direction - (span[:step] @ direction) @ span[:step]
                span[step] = direction / direction.norm().clamp(min=torch.finfo(direction.dtype).tiny)
                distance.sub_((basis @ span[step]).square()).clamp_(min=0)
    rows[highest:] = free.nonzero().flatten()
    return rows


def coefficients_of(u: Tensor, rows: Tensor) -> Tensor:
    """C = u[J] u[I]^-1 with I the first r of `rows` and J the rest; not finite where u[I] is singular."""
    rank = u.shape[1]
    return torch.linalg.solve_ex(u[rows[:rank]], u[rows[rank:]], left=False).result


def _largest(coefficients: Tensor) -> float:
    """The largest magnitude; infinite where one is not finite."""
    return float(coefficients.abs().nan_to_num(torch.inf, torch.inf).max()) if coefficients.numel() else 0.0


def _stretches(ranks: list[int], count: int) -> list[tuple[int, int]]:
    """The order's parts, within which rows are alike to every matrix: [0, r1), [r1, r2), ..., [rk, count)."""
    return list(pairwise(sorted({0, *ranks, count})))


def _swap(rows: Tensor, coefficients: list[Tensor], *, limit: float, what: str) -> Tensor:
    """Exchange a pivot with another row while that multiplies the product of the determinants of all u[I] by more
    than the limit (maxvol); returns the rows. Changes `coefficients` in place.
    """
    ranks = [c.shape[1] for c in coefficients]
    stretches = _stretches(ranks, len(rows))
    for _ in range(MOST_SWAPS_PER_RANK * max(ranks)):
        gain, low, high = max((_best_swap(coefficients, *pair) for pair in combinations(stretches, 2)), default=STAY)
        if gain <= limit:
            return rows
        for c in coefficients:
            exchange(c, low, high)
        rows[[low, high]] = rows[[high, low]]
    log.warning("%s: swaps stopped where one more would gain a factor of %.2f", what, gain)
    return rows


def _best_swap(coefficients: list[Tensor], before: tuple[int, int], after: tuple[int, int]) -> tuple[float, int, int]:
    """Factor and places of the swap between two parts of the order that raises the determinants' product most.

    It concerns the matrices for which the first part holds pivots and the second does not.
    """
    gains = None
    for c in coefficients:
        rank = c.shape[1]
        if before[1] <= rank <= after[0]:
            block = c[after[0] - rank : after[1] - rank, before[0] : before[1]].abs()
            gains = block if gains is None else gains * block
    if gains is None:
        return STAY
    row = int(gains.amax(dim=1).argmax())  # the argmax of a whole matrix is slow on the CPU
    column = int(gains[row].argmax())
    return gains[row, column].item(), before[0] + column, after[0] + row


def exchange(coefficients: Tensor, low: int, high: int) -> None:
    """Rows at places low < high of the order change places: what that makes of C, in place."""
    rank = coefficients.shape[1]
    if high < rank:
        coefficients[:, [low, high]] = coefficients[:, [high, low]]
    elif low >= rank:
        coefficients[[low - rank, high - rank]] = coefficients[[high - rank, low - rank]]
    else:
        i, j = high - rank, low
        peak, row, column = coefficients[i, j].clone(), coefficients[i].clone(), coefficients[:, j].clone()
        coefficients.addr_(column, row / peak, alpha=-1)
        coefficients[i], coefficients[:, j] = -row / peak, column / peak
        coefficients[i, j] = 1 / peak


def _pivots_of(u: Tensor, v: Tensor, rows: Tensor, *, stretches: list[tuple[int, int]]) -> Pivots:
    """Sort the rows within each part of the order; solve afresh, as swaps have added rounding to what they ran on."""
    rows = torch.cat([rows[start:stop].sort().values for start, stop in stretches])
    perm = torch.empty_like(rows)
    perm[rows] = torch.arange(len(rows), device=rows.device)
    return Pivots(u[rows[: u.shape[1]]] @ v, coefficients_of(u, rows), perm.int())
