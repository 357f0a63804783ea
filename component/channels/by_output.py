"""Narrower heads and MLPs by what the projection behind them loses: tensors in, tensors out.

FLAT-LLM (flatllm.py) looks at the values, or the channels, alone. Here both are ordered in the metric of the linear
that reads them, and what each number of channels costs the model comes from the same Fisher estimate as the loss of
ranks (sensitivity.py), so that the two can be compared.
"""

import torch
from torch import Tensor

from component.channels.flatllm import absorb_bases, refitted
from component.solve.linalg import damped_cholesky
from component.solve.reconstruction import EXACT_DAMPING
from component.solve.sensitivity import loss_of_dropping
from component.solve.whitening import WHITENING_DAMPING

LEAST_UNSEEN = 1e-3
ROUNDS = 16  # in which channels are given up; the others make up for them after each


def head_blocks(moment: Tensor, *, query_heads: int, heads: int) -> Tensor:
    """Second moment of what reaches each head of the values, summed over the query heads that read it.

    moment: (query_heads * head_dim,) squared. Returns (heads, head_dim, head_dim).
    """
    blocks = moment.unflatten(0, (query_heads, -1)).unflatten(2, (query_heads, -1))
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (query_heads, head_dim, head_dim)
    return own.unflatten(0, (heads, -1)).sum(1)


def head_metric(weight: Tensor, *, query_heads: int, heads: int) -> Tensor:
    """O_h^T O_h by head of the values, summed over its query heads. weight: (d_out, query_heads * head_dim)."""
    by_head = weight.unflatten(1, (heads, query_heads // heads, -1))
    return torch.einsum("oqgk,oqgl->qkl", by_head, by_head)


def head_directions(moment: Tensor, metric: Tensor, what: str = "module") -> tuple[Tensor, Tensor]:
    """decode D and encode E with z ~ sum_j d_j e_j^T z for each head, the j that counts most for the output first.

    With moment L L^T and metric N the d_j are L u_j and the e_j L^-T u_j, of the eigenvectors u_j of L^T N L: the
    truncation of O L for one query head per head, plain PCA where N = I and moment is that of the values.

    moment, metric: (heads, head_dim, head_dim), float64. Returns D (heads, head_dim, head_dim) with the d_j as columns
    and E with the e_j as rows.
    """
    factors = torch.stack([damped_cholesky(one, WHITENING_DAMPING, what)[0] for one in moment])
    _, vectors = torch.linalg.eigh(factors.mT @ metric @ factors)
    vectors = vectors.flip(-1)
    return factors @ vectors, torch.linalg.solve_triangular(factors.mT, vectors, upper=True).mT


def reading_axes(moment: Tensor, metric: Tensor, width: int, *, what: str = "module") -> Tensor:
    """An orthonormal basis of the first `width` encoding directions: (heads, head_dim, width)."""
    _, encode = head_directions(moment, metric, what)
    return torch.linalg.qr(encode[:, :width].mT).Q


def narrow_output(
    weight: Tensor, target: Tensor, moment: Tensor, *, bases: Tensor, damping: float, what: str = "module"
) -> Tensor:
    """The output projection fitted to heads in these bases: see `refitted`; (d_out, query heads * width) float64.

    weight: (d_out, query heads * head_dim); target: Y z^T of the same shape; moment: z z^T of the full heads.
    """
    inner = absorb_bases(absorb_bases(moment, bases).T, bases)
    return refitted(absorb_bases(weight, bases), absorb_bases(target, bases), inner, damping=damping, what=what)


def channel_order(weight: Tensor, moment: Tensor, damping: float, *, what: str = "module") -> Tensor:
    """Channels, those that the output can least do without first: (n,) int64.

    A sixteenth of all goes at a time: those whose loss ||w_j||^2 / (H^-1)_jj is least, and the columns w_j of the
    others make up for them (the optimal brain surgeon's step, for whole columns). H = C + mu I.

    weight: (m, n), in the metric of the output; moment: C (n, n) float64; damping: mu over its mean diagonal.
    """
    factor, _ = damped_cholesky(moment, damping, what)
    inverse, fitted = torch.cholesky_inverse(factor), weight.double()
    left = torch.arange(len(moment), device=moment.device)
    step = -(-len(left) // ROUNDS)
    gone: list[Tensor] = []
    while len(left):
        order = (fitted.square().sum(0) / inverse.diagonal()).argsort(stable=True)
        out, stay = order[:step], order[step:]
        gone.append(left[out])
        share = torch.linalg.solve(inverse[out][:, out], inverse[out][:, stay])  # of those that go, in those that stay
        fitted = fitted[:, stay] - fitted[:, out] @ share
        inverse = inverse[stay][:, stay] - inverse[stay][:, out] @ share
        left = left[stay]
    return torch.cat(gone).flip(0)


def head_curve(
    weight: Tensor,
    gram: Tensor,
    *,
    inputs: Tensor,
    gradients: Tensor,
    weighting: Tensor | None,
    query_heads: int,
    heads: int,
    what: str = "module",
) -> Tensor:
    """Expected KL per token at every width of the heads: (head_dim + 1,) float64; entry w is for width w.

    weight: (d_out, query_heads * head_dim) of the output projection; gram: of its inputs, float64; inputs, gradients:
    of the same tokens, (tokens, d_in) and (tokens, d_out); weighting: L_g or None.
    """
    metric = head_metric(weighted(weight, weighting), query_heads=query_heads, heads=heads)
    decode, encode = head_directions(head_blocks(gram, query_heads=query_heads, heads=heads), metric, what)
    written = absorb_bases(weight, decode).float()  # (d_out, query_heads * head_dim)
    shared = encode.repeat_interleave(query_heads // heads, 0).float()
    read = torch.einsum("tqk,qjk->tqj", inputs.float().unflatten(1, (query_heads, -1)), shared)
    scores = (gradients.float() @ written).unflatten(1, (query_heads, -1)) * read
    return loss_of_dropping(scores.sum(1))


def channel_curve(
    weight: Tensor,
    gram: Tensor,
    *,
    inputs: Tensor,
    gradients: Tensor,
    weighting: Tensor | None,
    tokens: int,
    what: str = "module",
) -> Tensor:
    """Expected KL per token at every number of channels that are kept, in their order: (n + 1,) float64.

    With H = L L^T in that order and z = L e, the first k entries of e are known from the first k channels, and the
    rest is what compensation does not give back. A fit of k channels to T tokens leaves less on these than on others:
    the losses are over (1 - k / T)^2, as in generalised cross-validation, and beyond any bound where T is too small.

    weight: (d_out, n) of the projection behind the MLP; tokens: T, of the gram; the rest as in `head_curve`.
    """
    order = channel_order(weighted(weight, weighting), gram, EXACT_DAMPING, what=what)
    factor, _ = damped_cholesky(gram[order][:, order], EXACT_DAMPING, what)
    written = weight.double()[:, order] @ factor
    inverse = torch.linalg.solve_triangular(
        factor, torch.eye(len(order), dtype=factor.dtype, device=factor.device), upper=False
    )
    read = inputs.float()[:, order] @ inverse.T.float()
    curve = loss_of_dropping((gradients.float() @ written.float()) * read)
    unseen = 1 - torch.arange(len(curve), device=curve.device) / tokens
    unseen[-1] = 1  # all of them: nothing is fitted
    return curve / unseen.clamp(min=LEAST_UNSEEN) ** 2


def weighted(weight: Tensor, weighting: Tensor | None) -> Tensor:
    return weight.double() if weighting is None else weighting.T @ weight.double()
