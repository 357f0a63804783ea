"""What a module's truncation costs the whole model, to second order and from one backward pass. Tensors in and out.

For a small change of one module's output, dy_t at token t, the KL divergence between the model's output before and
after is half the expected square of its directional score: KL ~ 1/2 E (sum_t g_t . dy_t)^2, where g_t is the gradient
of the log-likelihood of labels drawn from the model itself (the Fisher information). Terms between different tokens
are left out: their expectation is small, and with a few windows they would be noise.
"""

import torch
from torch import Tensor

from component.solve.linalg import check_finite, damped_cholesky, raised_diagonal
from component.solve.whitening import WHITENING_DAMPING

OUTLIER_FACTOR = 5.0  # M of OWL


def output_moment(output_gram: Tensor, shrinkage: float) -> Tensor:
    """Sigma_g in which a module's output errors are measured: shrunk towards the identity, mean diagonal 1.

    output_gram: (d_out, d_out) = sum_t g_t g_t^T; shrinkage: the share a in (0, 1] of the identity, at the same mean
    diagonal; 1 is no weighting. Returns (d_out, d_out) float64.
    """
    gram = output_gram.double()
    mean = gram.diagonal().mean()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if mean <= 0:  # nothing downstream depends on this module
        return identity
    return (1 - shrinkage) * gram / mean + shrinkage * identity


def output_weighting(output_gram: Tensor, shrinkage: float, what: str = "module") -> Tensor:
    """L_g of the weighting by Sigma_g = L_g L_g^T: (d_out, d_out) lower triangular, float64. See output_moment."""
    return damped_cholesky(output_moment(output_gram, shrinkage), 0.0, f"{what}, output weighting")[0]


def loss_curve(
    weight: Tensor, gram: Tensor, *, inputs: Tensor, gradients: Tensor, moment: Tensor, what: str = "module"
) -> Tensor:
    """Expected KL per token at every rank: (k + 1,) float64 with k = min(d_out, d_in); entry r is for rank r.

    Truncation is the one the solvers make, [L_g^T W L]_r with the components dropped from the smallest up; the error
    of dropping all components from r on is evaluated on the tokens themselves, with no independence assumed.

    Only the moments of the smaller side are factored: with W as wide as it is high or wider, L_g^T W L has the left
    singular vectors P of L_g^T W G W^T L_g, and its components are those of L_g^-T P and P^T L_g^T W. A higher one is
    the same problem transposed, inputs and gradients changing places.

    weight: (d_out, d_in); gram: (d_in, d_in) float64 = sum_t x_t x_t^T; inputs: (tokens, d_in) x_t; gradients:
    (tokens, d_out) g_t; moment: (d_out, d_out) float64, Sigma_g = L_g L_g^T. The moments' diagonals are others while
    this runs.

    Raises: RunError naming `what` where a moment is not finite.
    """
    (left, near), (right, far) = (moment, gradients), (gram, inputs)
    if weight.shape[0] > weight.shape[1]:
        weight, left, near, right, far = weight.T, right, far, left, near
    check_finite(right, what)
    with raised_diagonal(gram, WHITENING_DAMPING * gram.diagonal().mean().item()):
        factor, _ = damped_cholesky(left, 0.0, what)
        target = factor.T @ weight.double()
        directions = torch.linalg.eigh(target @ right @ target.T).eigenvectors.flip(1)
    u = torch.linalg.solve_triangular(factor.T, directions, upper=True)
    return loss_of_dropping((near.float() @ u.float()) * (far.float() @ (target.T @ directions).float()))


def loss_of_dropping(scores: Tensor) -> Tensor:
    """Expected KL per token of dropping all components from j on: (k + 1,) float64.

    scores: (tokens, k), of each component g_t . (what it adds to y_t).
    """
    dropped = scores.double().flip(1).cumsum(1).flip(1)  # (tokens, k): the sum over all components from j on
    curve = dropped.square().sum(0) / (2 * len(scores))
    return torch.cat([curve, curve.new_zeros(1)])


def outlier_share(weights: list[Tensor], input_norms: list[Tensor]) -> float:
    """Share of a layer's weights whose |W_ij| ||x_j|| exceeds 5 times the layer's mean of it (OWL, arXiv 2310.05175).

    weights: (d_out, d_in) each; input_norms: (d_in,) each, the norm of every input channel over all tokens.
    """
    scores = [weight.abs().double() * norms for weight, norms in zip(weights, input_norms, strict=True)]
    count = sum(score.numel() for score in scores)
    limit = OUTLIER_FACTOR * sum(score.sum() for score in scores) / count
    return float(sum((score > limit).sum() for score in scores)) / count


def angular_influence(before: Tensor, after: Tensor) -> float:
    """Mean angle, over pi, between a block's input and output hidden states: (tokens, width) each (FLAT-LLM)."""
    cosines = torch.cosine_similarity(before.double(), after.double(), dim=-1).clamp(-1, 1)
    return float(cosines.arccos().mean() / torch.pi)
