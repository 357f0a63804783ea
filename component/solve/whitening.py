"""W: SVD-LLM's truncation-aware whitening (arXiv 2403.07378), and what it is compared with: plain SVD and ASVD."""

import torch
from torch import Tensor

from component.solve.linalg import balance, damped_cholesky
from utils.errors import RunError

WHITENING_DAMPING = 1e-6  # of the mean diagonal; only there to survive a singular Gram matrix
ASVD_ALPHA = 0.5  # of the paper; 0 is the plain SVD
ASVD_FLOOR = 1e-6  # of the mean scale: a channel that calibration never saw is still stored


def truncate(target: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation of target: (m, n) as u: (m, r) and v: (r, n), u v = [target]_r.

    By an eigendecomposition of the smaller Gram side in float64, several times faster than an SVD. It needs no
    division by singular values, so nothing is lost on rank-deficient targets.
    """
    target = target.double()
    if target.shape[0] <= target.shape[1]:
        u = torch.linalg.eigh(target @ target.T).eigenvectors[:, -rank:].flip(1)
        return u, u.T @ target
    v = torch.linalg.eigh(target.T @ target).eigenvectors[:, -rank:].flip(1).T
    return target @ v.T, v


def plain_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[W]_r as balanced u: (d_out, r), v: (r, d_in), float64: the best weight, blind to the data."""
    return balance(*truncate(weight, rank))


def whitened_factors(weight: Tensor, gram: Tensor, rank: int, *, what: str = "module") -> tuple[Tensor, Tensor]:
    """W' = [W L]_r L^-1 with gram = X X^T = L L^T: the least ||W X - W' X||_F at rank r (SVD-LLM, Sec. 3.1).

    weight: (d_out, d_in); gram: (d_in, d_in) float64. Returns balanced u: (d_out, r), v: (r, d_in), float64.
    """
    factor, _ = damped_cholesky(gram, WHITENING_DAMPING, what)
    u, v = truncate(weight.double() @ factor, rank)
    return balance(u, torch.linalg.solve_triangular(factor, v, upper=False, left=False))


def scaled_factors(
    weight: Tensor, magnitude: Tensor, rank: int, *, what: str = "module", alpha: float = ASVD_ALPHA
) -> tuple[Tensor, Tensor]:
    """W' = [W S]_r S^-1 with S = diag(magnitude)^alpha: columns count by the size of their inputs (ASVD, arXiv
    2312.05821, Sec. 3.2).

    weight: (d_out, d_in); magnitude: (d_in,), mean |x| by channel or any multiple of it, which cancels. Returns
    balanced u: (d_out, r), v: (r, d_in), float64.

    Raises: RunError naming the module where a magnitude is not finite.
    """
    if not torch.isfinite(magnitude).all():
        raise RunError(f"{what}: the activations are not finite")
    scale = magnitude.double() ** alpha
    mean = scale.mean().item()
    scale = scale.clamp(min=ASVD_FLOOR * mean) if mean > 0 else torch.ones_like(scale)
    u, v = truncate(weight.double() * scale, rank)
    return balance(u, v / scale)
