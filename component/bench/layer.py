"""One linear layer in every form it can be stored in.

Weights are random: speed does not depend on values as long as they vary, so nothing is factored here.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from component.bench.rows import Maker, Row
from component.format.kernels import pifa_linear, pivoted_product
from component.ranks.cost import LOW_RANK, PIVOTED
from utils.errors import UsageError

ALIGNED, TILE = 16, 64  # numbers
COEFFICIENT_NORM = 3.5  # of a row of C, as pivoting real weights gives
DENSE, LOW_RANK_SAME_RANK, LOW_RANK_SAME_DENSITY = "dense", "low-rank, same rank", "low-rank, same density"
PUBLISHED, PIVOT_ORDER, NATURAL_ORDER = "PIFA, two index copies", "PIFA here, pivot order", "PIFA here"
TWO_FOUR, TWO_FOUR_CUTLASS = "2:4 cuSPARSELt", "2:4 CUTLASS"


class Shape(NamedTuple):
    """A linear layer, and the rank that a pivoted one has.

    Ranks at a density are rounded down to multiples of 64 or 16: products with slices that start at odd places are
    several times slower, whoever makes them, and the last tile of others is mostly empty, which a comparison of formats
    should not measure. Layers of a checkpoint keep the ranks they have.
    """

    d_out: int
    d_in: int
    rank: int

    @classmethod
    def at_density(cls, d_out: int, d_in: int, density: float) -> "Shape":
        """Raises: UsageError where the density leaves nothing to do, or no rank."""
        rank = PIVOTED.rank_for(density * d_out * d_in, d_out, d_in)
        if not rank:
            raise UsageError(f"a pivoted {d_out} x {d_in} layer cannot have density {density:g}")
        return cls(d_out, d_in, aligned(rank))

    @property
    def density(self) -> float:
        return PIVOTED.numbers(self.rank, self.d_out, self.d_in) / (self.d_out * self.d_in)

    @property
    def low_rank(self) -> int:
        """The rank that U V has at the same density, at least 1."""
        stored = PIVOTED.numbers(self.rank, self.d_out, self.d_in)
        return aligned(LOW_RANK.rank_for(stored, self.d_out, self.d_in) or 1)

    @property
    def labels(self) -> dict[str, float]:
        return {**self._asdict(), "density": self.density}


def aligned(rank: int) -> int:
    """The next multiple of 64 below if that is at most a hundredth less, else of 16; small ranks stay as they are."""
    if rank < 2 * ALIGNED:
        return rank
    return rank - rank % (TILE if rank % TILE <= rank / 100 else ALIGNED)


class Pivoted(NamedTuple):
    """Tensors of a pivoted layer, and its pivots' and the other outputs' columns as the published code keeps them."""

    pivot: Tensor  # (r, d_in)
    coeff: Tensor  # (d_out - r, r)
    perm: Tensor  # (d_out,) int32
    pivots: Tensor  # (r,) int64
    others: Tensor  # (d_out - r,) int64


def draw(rows: int, columns: int, *, dtype: torch.dtype, device: torch.device, norm: float = 1.0) -> Tensor:
    """(rows, columns) normal numbers, the rows of that norm on average."""
    return torch.randn(rows, columns, device=device, dtype=dtype) * (norm / columns**0.5)


def draw_pivots(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random pivots: (r,), and the other outputs: (d_out - r,), both sorted int64."""
    pivots = torch.randperm(shape.d_out, device=device)[: shape.rank].sort().values
    is_other = torch.ones(shape.d_out, dtype=torch.bool, device=device)
    is_other[pivots] = False
    return pivots, is_other.nonzero().flatten()


def draw_pivoted(shape: Shape, dtype: torch.dtype, device: torch.device) -> Pivoted:
    d_out, d_in, rank = shape
    pivots, others = draw_pivots(shape, device)
    perm = torch.cat([pivots, others]).argsort().int()
    pivot = draw(rank, d_in, dtype=dtype, device=device)
    coeff = draw(d_out - rank, rank, dtype=dtype, device=device, norm=COEFFICIENT_NORM)
    return Pivoted(pivot=pivot, coeff=coeff, perm=perm, pivots=pivots, others=others)


def dense(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def low_rank(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return F.linear(F.linear(x, v), u)


def published_pifa(x: Tensor, layer: Pivoted) -> Tensor:
    """PIFA as published (arXiv 2501.19090, Alg. 2): each product is copied into its columns of the output.

    x: (tokens, d_in) -> (tokens, d_out)
    """
    y_pivot = F.linear(x, layer.pivot)
    y = x.new_empty(len(x), len(layer.perm)).index_copy_(1, layer.pivots, y_pivot)
    return y.index_copy_(1, layer.others, F.linear(y_pivot, layer.coeff))


def plain_pifa(x: Tensor, layer: Pivoted, natural: bool = True) -> Tensor:
    """The oracle: [y_p, y_np], in natural order or as it is."""
    y_pivot = F.linear(x, layer.pivot)
    y = torch.cat([y_pivot, F.linear(y_pivot, layer.coeff)], dim=-1)
    return y.index_select(-1, layer.perm.long()) if natural else y


def layer_makers(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, names: Collection[str] | None = None
) -> list[Maker]:
    """Every way to run a layer of this shape, dense first; or those of these names."""
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    makers: dict[str, Maker] = {
        DENSE: partial(dense_row, shape, **like),
        LOW_RANK_SAME_RANK: partial(low_rank_row, LOW_RANK_SAME_RANK, shape, shape.rank, **like),
        LOW_RANK_SAME_DENSITY: partial(low_rank_row, LOW_RANK_SAME_DENSITY, shape, shape.low_rank, **like),
        **{name: partial(pifa_row, name, shape, **like) for name in (PUBLISHED, PIVOT_ORDER, NATURAL_ORDER)},
        **{name: partial(two_four_row, name, shape, **like) for name in (TWO_FOUR, TWO_FOUR_CUTLASS)},
    }
    return [maker for name, maker in makers.items() if names is None or name in names]


def dense_row(shape: Shape, *, dtype: torch.dtype, device: torch.device) -> Row:
    weight = draw(shape.d_out, shape.d_in, dtype=dtype, device=device)

    def expected(x: Tensor) -> Tensor:
        return dense(x, weight.double())

    return Row(DENSE, (weight,), forward=lambda x: dense(x, weight), expected=expected, flops=2 * weight.numel())


def low_rank_row(name: str, shape: Shape, rank: int, *, dtype: torch.dtype, device: torch.device) -> Row:
    u = draw(shape.d_out, rank, dtype=dtype, device=device)
    v = draw(rank, shape.d_in, dtype=dtype, device=device)

    def expected(x: Tensor) -> Tensor:
        return low_rank(x, u.double(), v.double())

    flops = 2 * (u.numel() + v.numel())
    return Row(name, (u, v), forward=lambda x: low_rank(x, u, v), expected=expected, flops=flops)


def pifa_row(name: str, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> Row:
    layer = draw_pivoted(shape, dtype, device)
    pivot, coeff, perm, pivots, others = layer
    flops = 2 * (pivot.numel() + coeff.numel())

    def expected(x: Tensor) -> Tensor:
        wide = layer._replace(pivot=pivot.double(), coeff=coeff.double())
        return plain_pifa(x, wide, natural=name != PIVOT_ORDER)

    def natural(x: Tensor) -> Tensor:
        return pifa_linear(x, pivot, coeff, perm)

    stored: dict[str, tuple[tuple[Tensor, ...], Callable[[Tensor], Tensor]]] = {
        PUBLISHED: ((pivot, coeff, pivots, others), lambda x: published_pifa(x, layer)),
        PIVOT_ORDER: ((pivot, coeff), lambda x: pivoted_product(x, pivot, coeff)),
        NATURAL_ORDER: ((pivot, coeff, perm), natural),
    }
    tensors, forward = stored[name]
    return Row(name, tensors, forward=forward, expected=expected, flops=flops)


def two_four_row(name: str, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> Row:
    """2:4 sparsity as torch.sparse stores and multiplies it, by one of its two libraries.

    The larger two of every four weights are kept. (W x^T)^T, not F.linear: to write y by rows takes cuSPARSELt 200
    times as long (H100, torch 2.11), and later versions' F.linear asks for that. So here y lies by columns, and is
    charged nothing for it. The library's search for a faster algorithm finds none there, or ends in an internal error.
    """
    if device.type != "cuda":
        return Row(name, refused="not supported here: no GPU")
    weight = draw(shape.d_out, shape.d_in, dtype=dtype, device=device)
    groups = weight.view(shape.d_out, -1, 4)
    pruned = groups.scatter(-1, groups.abs().topk(2, dim=-1, largest=False).indices, 0).view_as(weight)
    kinds: dict[str, Any] = {
        TWO_FOUR: torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        TWO_FOUR_CUTLASS: torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }
    try:  # whether card, library, dtype and shape go together, only a call tells
        sparse = kinds[name].from_dense(pruned)
        two_four(pruned[:1], sparse)
    except RuntimeError as error:
        return Row(name, refused=f"not supported here: {str(error).strip().splitlines()[0]}")

    def expected(x: Tensor) -> Tensor:
        return dense(x, pruned.double())

    stored = tuple(t for t in (sparse.packed, sparse.meta) if t is not None)
    flops = weight.numel()  # half of the products
    return Row(
        name,
        stored,
        forward=lambda x: two_four(x, sparse),
        expected=expected,
        flops=flops,
        has_gradients=False,
        foreign=True,
    )


def two_four(x: Tensor, sparse: Tensor) -> Tensor:
    """x: (tokens, d_in), sparse: (d_out, d_in) semi-structured -> (tokens, d_out)"""
    return (sparse @ _whole_tiles(x).T).T[: len(x)]


def _whole_tiles(x: Tensor) -> Tensor:
    """x: (tokens, d_in) with zeros added up to a multiple of 16 tokens, which the libraries ask for."""
    return F.pad(x, (0, 0, 0, -len(x) % ALIGNED)) if len(x) % ALIGNED else x
