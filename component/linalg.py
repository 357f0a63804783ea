"""Linear algebra that must not fail on what real activations bring: dead channels, few samples, rounding."""

import logging

import torch
from torch import Tensor

from utils.errors import RunError

log = logging.getLogger("pifa")

ESCALATION = 10.0  # each failed factorisation multiplies the damping by this


def damped_cholesky(gram: Tensor, damping: float, what: str) -> tuple[Tensor, float]:
    """Factor gram + mu I = L L^T with the least mu that works, from `damping` times the mean diagonal upwards.

    gram: (n, n) float64, symmetric; it may be singular or, by rounding, slightly indefinite. A Gram matrix of all
    zeros (a dead input) is damped by 1, which makes every solve fall back to the plain, unweighted problem.

    Returns L: (n, n) lower triangular, and mu, absolute.

    Raises: RunError naming `what` where the matrix is not finite.
    """
    if not torch.isfinite(gram).all():
        raise RunError(f"{what}: the moments of its input are not finite")
    scale = gram.diagonal().mean().clamp(min=0).item()
    if scale == 0:
        return torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device), 1.0
    relative = damping
    while True:
        mu = relative * scale
        factor, info = torch.linalg.cholesky_ex(add_diagonal(gram, mu))
        if info.item() == 0 and torch.isfinite(factor).all():
            return factor, mu
        relative = max(relative * ESCALATION, torch.finfo(gram.dtype).eps * gram.shape[0])
        log.warning(
            "%s: Gram matrix not positive definite, damping raised to %.1e of its mean diagonal", what, relative
        )


def add_diagonal(matrix: Tensor, value: float) -> Tensor:
    """matrix + value I, a new tensor."""
    result = matrix.clone()
    result.diagonal().add_(value)
    return result


def solve_right(matrix: Tensor, factor: Tensor) -> Tensor:
    """matrix (L L^T)^-1 for matrix: (m, n) and lower triangular L: (n, n)."""
    return torch.cholesky_solve(matrix.T, factor).T


def balance(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Scale column j of u and row j of v against each other until both have the same norm: half precision likes it."""
    left, right = u.norm(dim=0), v.norm(dim=1)
    scale = torch.where((left > 0) & (right > 0), (right / left).sqrt(), torch.ones_like(left))
    return u * scale, v / scale[:, None]


def packed(symmetric: Tensor) -> Tensor:
    """The lower triangle of (n, n), row by row: (n (n + 1) / 2,)."""
    rows, columns = torch.tril_indices(*symmetric.shape, device=symmetric.device)
    return symmetric[rows, columns]


def unpacked(triangle: Tensor) -> Tensor:
    """The symmetric matrix of which this is the lower triangle."""
    size = int((2 * len(triangle)) ** 0.5)  # n < sqrt(n (n + 1)) < n + 1
    lower = triangle.new_zeros(size, size)
    rows, columns = torch.tril_indices(size, size, device=triangle.device)
    lower[rows, columns] = triangle
    return lower + lower.tril(-1).T
