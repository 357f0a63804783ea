"""M: online error-accumulation-minimising reconstruction (PIFA, arXiv 2501.19090, Sec. 4), from two-flow moments.

With X_o the inputs of a module in the dense flow and X_u those in the low-rank flow, both solvers fit
W' X_u to the target Y_t = lambda W X_o + (1 - lambda) W X_u and see the data only through
gram G = X_u X_u^T and cross C = X_o X_u^T.
"""

import torch
from torch import Tensor

from component.solve.linalg import balance, damped_cholesky, raised_diagonal, solve_right
from component.solve.whitening import truncate

EXACT_DAMPING = 1e-3  # mu of the exact solver, of the mean diagonal of G
ROWS = 2048  # of moments that are mixed at once: all of them would be one more (d_in, d_in)
PAPER_RIDGE = 1e-3  # alpha of the paper's V step, absolute, on raw sums


def target_moment(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor | None,
    *,
    mix_ratio: float,
    drift: Tensor | None = None,
    drift_ratio: float = 0.0,
) -> Tensor:
    """Y_t X_u^T = W (lambda C + (1 - lambda) G) + rho (H_o - H_u) X_u^T: (d_out, d_in) float64.

    The last term is ours: a module that adds to a residual stream that has itself drifted from H_o to H_u is asked to
    repair a share rho of the drift. With rho = lambda the target of stream and module together is lambda times what
    the dense flow holds after the addition plus 1 - lambda times what the original module would make of the low-rank
    flow.

    weight: (d_out, d_in); gram, cross: (d_in, d_in); drift: (d_out, d_in), float64; mix_ratio: lambda; drift_ratio:
    rho. cross and drift may be None where their ratio is 0 or the module writes into no stream.
    """
    weight = weight.double()
    if cross is None:
        target = weight @ gram
    else:
        target = weight.new_zeros(len(weight), gram.shape[1])
        for part, c, g in zip(weight.split(ROWS, 1), cross.split(ROWS), gram.split(ROWS), strict=True):
            target.addmm_(part, ((1 - mix_ratio) * g).add_(c, alpha=mix_ratio))
    return target if drift is None else target.add_(drift, alpha=drift_ratio)


def exact_factors(
    weight: Tensor,
    target: Tensor,
    gram: Tensor,
    *,
    rank: int,
    damping: float = EXACT_DAMPING,
    weighting: Tensor | None = None,
    what: str = "module",
) -> tuple[Tensor, Tensor]:
    """The minimiser of ||Y_t - W' X_u||^2 + mu ||W - W'||^2 over all W' of rank r, in closed form.

    Reduced-rank regression: with B = Y_t X_u^T + mu W and G + mu I = L L^T, W' = [B L^-T]_r L^-1. It is what
    alternating U and V steps converge to (SAES-SVD and AA-SVD use the same form); the ridge pulls towards W, not
    towards zero. With a weighting L_g both norms are those of L_g^T times their argument, errors count by what they do
    to the model's output, and W' = L_g^-T [L_g^T B L^-T]_r L^-1 (IO-SVD and OBD-LLM weigh both sides so).

    weight: (d_out, d_in); target: (d_out, d_in) = Y_t X_u^T, float64; gram: (d_in, d_in) float64;
    damping: mu over the mean diagonal of gram; weighting: L_g (d_out, d_out) lower triangular, float64, or None.
    Returns balanced u: (d_out, r), v: (r, d_in), float64.
    """
    factor, mu = damped_cholesky(gram, damping, what)
    moment = torch.add(target, weight.double(), alpha=mu)
    whitened = torch.linalg.solve_triangular(factor, moment.T, upper=False).T
    u, v = truncate(whitened if weighting is None else weighting.T @ whitened, rank)
    if weighting is not None:
        u = torch.linalg.solve_triangular(weighting.T, u, upper=True)
    return balance(u, torch.linalg.solve_triangular(factor, v, upper=False, left=False))


def update_u(target: Tensor, gram: Tensor, v: Tensor, *, what: str = "module") -> Tensor:
    """U = B V^T (V G V^T)^-1, the best U for a given V (Algorithm 3, without a ridge).

    target: B (d_out, d_in); gram: G (d_in, d_in); v: (r, d_in), all float64. Returns (d_out, r).
    """
    factor, _ = damped_cholesky(v @ gram @ v.T, 0.0, f"{what}, U step")
    return solve_right(target @ v.T, factor)


def update_v(target: Tensor, gram: Tensor, u: Tensor, *, what: str = "module") -> Tensor:
    """V = (U^T U)^-1 U^T B G^-1, the best V for a given U (equation 9).

    target: B (d_out, d_in); gram: G (d_in, d_in); u: (d_out, r), all float64. Returns (r, d_in).
    """
    inner, _ = damped_cholesky(u.T @ u, 0.0, f"{what}, V step")
    outer, _ = damped_cholesky(gram, 0.0, f"{what}, V step")
    return solve_right(torch.cholesky_solve(u.T @ target, inner), outer)


def alternating_factors(
    weight: Tensor, target: Tensor, gram: Tensor, *, start: tuple[Tensor, Tensor], step: int, what: str = "module"
) -> tuple[Tensor, Tensor]:
    """The paper's single sweep from `start`: step 1 updates U, 2 updates U then V, -1 updates V alone.

    weight: (d_out, d_in); target: Y_t X_u^T, gram: X_u X_u^T, float64; start: u (d_out, r), v (r, d_in).
    The ridge alpha of the V step is the paper's: absolute, on both sides.
    """
    u, v = start
    if step in (1, 2):
        u = update_u(target, gram, v, what=what)
    if step in (2, -1):
        with raised_diagonal(gram, PAPER_RIDGE):
            v = update_v(target + PAPER_RIDGE * weight.double(), gram, u, what=what)
    return balance(u, v)
