"""FLAT-LLM (arXiv 2505.23966): narrower value heads by PCA, and a narrower MLP by choosing its channels.

Attention mixes tokens and never the channels of a head, so that a basis of a head's values commutes with it: the
value projection writes coordinates in that basis and the output projection reads them. In the MLP nothing but whole
channels can go, since the activation stands between the projections; the output projection makes up for those that do.
"""

import torch
from torch import Tensor

from component.solve.linalg import damped_cholesky, solve_right


def value_moment(values: Tensor, heads: int) -> Tensor:
    """Second moment of the values of each head, (heads, head_dim, head_dim) float64.

    values: (..., heads * head_dim), any float dtype; products are in float32 or better.
    """
    v = values.flatten(0, -2)
    v = v.to(torch.promote_types(v.dtype, torch.float32)).unflatten(-1, (heads, -1)).transpose(0, 1)
    return (v.mT @ v).double()


def head_axes(moment: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The principal axes of every head, Q_h, and the second moment that lies outside of them.

    moment: (heads, head_dim, head_dim), symmetric. Returns Q: (heads, head_dim, width) float64 with orthonormal
    columns, the largest eigenvalue first, and the sum of the discarded eigenvalues, (heads,): what
    ||v - Q Q^T v||^2 adds up to.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    kept = moment.shape[-1] - width
    return vectors[..., kept:].flip(-1), values[..., :kept].sum(-1)


def project_values(weight: Tensor, bias: Tensor | None, bases: Tensor) -> tuple[Tensor, Tensor | None]:
    """V_h' = Q_h^T V_h and the same of the bias.

    weight: (heads * head_dim, d_in), bias: (heads * head_dim,) or None; bases: (heads, head_dim, width).
    Returns (heads * width, d_in) and (heads * width,), float64.
    """
    heads = len(bases)
    narrow = (bases.mT @ weight.double().unflatten(0, (heads, -1))).flatten(0, 1)
    if bias is None:
        return narrow, None
    return narrow, (bases.mT @ bias.double().reshape(heads, -1, 1)).flatten()


def absorb_bases(weight: Tensor, bases: Tensor) -> Tensor:
    """O_h' = O_h Q_g, where query head h reads the values of its group's head g.

    weight: (d_out, query heads * head_dim); bases: (heads, head_dim, width), a divisor of the query heads, each
    serving as many neighbouring ones. Returns (d_out, query heads * width) float64.
    """
    heads, head_dim, _ = bases.shape
    blocks = weight.double().unflatten(1, (heads, -1, head_dim))  # (d_out, heads, query heads of one, head_dim)
    return torch.einsum("ohqd,hdw->ohqw", blocks, bases).flatten(1)


def leverage_scores(moment: Tensor, ridge: float) -> Tensor:
    """diag(C (C + lambda I)^-1) = 1 - lambda diag((C + lambda I)^-1): how far each channel stands by itself.

    moment: C (n, n), symmetric positive semidefinite; ridge: lambda > 0, absolute. Returns (n,) float64, in [0, 1).
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=0)
    return vectors.square() @ (values / (values + ridge))


def most_telling(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, in rising order; of equal ones the earlier index. (count,) int64."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def compensated(
    weight: Tensor, target: Tensor, moment: Tensor, *, kept: Tensor, damping: float, what: str = "module"
) -> Tensor:
    """The minimiser W' of ||Y - W' z_S||^2 + mu ||W S - W'||^2: Nystrom's W C S (S^T C S)^-1 where Y = W z and mu = 0.

    The ridge pulls towards the channels' own weights, not towards zero, so that nothing changes where all are kept.

    weight: W (d_out, n); target: Y z^T (d_out, n), W C where nothing else is asked for; moment: C = z z^T (n, n),
    float64; kept: S as indices (k,); damping: mu over the mean diagonal of S^T C S. Returns (d_out, k) float64.
    """
    return refitted(weight.double()[:, kept], target[:, kept], moment[kept][:, kept], damping=damping, what=what)


def refitted(weight: Tensor, target: Tensor, moment: Tensor, *, damping: float, what: str = "module") -> Tensor:
    """The minimiser W' of ||Y - W' z||^2 + mu ||W - W'||^2. target: Y z^T; moment: z z^T; damping: mu over its mean."""
    factor, mu = damped_cholesky(moment, damping, what)
    return solve_right(target + mu * weight.double(), factor)
