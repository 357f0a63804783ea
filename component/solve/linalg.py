"""Linear algebra that must not fail on what real activations bring: dead channels, few samples, rounding."""

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from utils.errors import RunError

log = logging.getLogger("pifa")

ESCALATION = 10.0  # each failed factorisation multiplies the damping by this


def damped_cholesky(gram: Tensor, damping: float, what: str) -> tuple[Tensor, float]:
    """Factor gram + mu I = L L^T with the least mu that works, from `damping` times the mean diagonal upwards.

    gram: (n, n) float64, symmetric; it may be singular or, by rounding, slightly indefinite. A Gram matrix of all
    zeros (a dead input) is damped by 1, which makes every solve fall back to the plain, unweighted problem. Its
    diagonal is another one while this runs: with n of tens of thousands there is no room for copies.

    Returns L: (n, n) lower triangular, and mu, absolute.

    Raises: RunError naming `what` where the matrix is not finite.
    """
    check_finite(gram, what)
    scale = gram.diagonal().mean().clamp(min=0).item()
    if scale == 0:
        return torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device), 1.0
    relative = damping
    while True:
        mu = relative * scale
        with raised_diagonal(gram, mu):
            factor, info = torch.linalg.cholesky_ex(gram)
        if info.item() == 0 and _all_finite(factor.mT):  # its columns are contiguous
            return factor, mu
        relative = max(relative * ESCALATION, torch.finfo(gram.dtype).eps * gram.shape[0])
        log.warning(
            "%s: Gram matrix not positive definite, damping raised to %.1e of its mean diagonal", what, relative
        )


def check_finite(gram: Tensor, what: str) -> None:
    """Raises: RunError naming `what` where the matrix is not finite."""
    if not _all_finite(gram):
        raise RunError(f"{what}: the moments of its input are not finite")


def _all_finite(matrix: Tensor) -> bool:
    """As torch.isfinite finds it, which makes copies on the way. matrix: contiguous, or this makes one too."""
    return all(torch.isfinite(end).item() for end in torch.aminmax(matrix))  # both are NaN where one number is


@contextlib.contextmanager
def raised_diagonal(matrix: Tensor, value: float) -> Iterator[None]:
    """Inside, the matrix is matrix + value I; then it is as before, bit by bit."""
    diagonal = matrix.diagonal()
    before = diagonal.clone()
    diagonal.add_(value)
    try:
        yield
    finally:
        diagonal.copy_(before)


def solve_right(matrix: Tensor, factor: Tensor) -> Tensor:
    """matrix (L L^T)^-1 for matrix: (m, n) and lower triangular L: (n, n)."""
    return torch.cholesky_solve(matrix.T, factor).T


def balance(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Scale column j of u and row j of v against each other until both have the same norm: half precision likes it."""
    left, right = u.norm(dim=0), v.norm(dim=1)
    scale = torch.where((left > 0) & (right > 0), (right / left).sqrt(), torch.ones_like(left))
    return u * scale, v / scale[:, None]


def pack_triangle(symmetric: Tensor) -> Tensor:
    """The lower triangle of (n, n), row by row: (n (n + 1) / 2,)."""
    rows, columns = torch.tril_indices(*symmetric.shape, device=symmetric.device)
    return symmetric[rows, columns]


def unpack_triangle(triangle: Tensor) -> Tensor:
    """The symmetric matrix of which this is the lower triangle."""
    size = int((2 * len(triangle)) ** 0.5)  # n < sqrt(n (n + 1)) < n + 1
    lower = triangle.new_zeros(size, size)
    rows, columns = torch.tril_indices(size, size, device=triangle.device)
    lower[rows, columns] = triangle
    return lower + lower.tril(-1).T
