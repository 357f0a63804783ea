"""The MLP of a LLaMA layer, down(silu(gate(x)) * up(x)), in every form: where a reorder costs, or is no longer there.

`stacked` rows are those of the lean runner: gate and up are one product, and one kernel does silu(gate) * up, reading
each output from where it lies. Dense and low-rank rows get the same kernels, so what is left is the format's doing.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from component.bench.layer import PUBLISHED, TWO_FOUR, Pivoted, Shape, draw_pivots, published_pifa, two_four_row
from component.bench.rows import Maker, Row
from component.format.linear import LowRankLinear, PIFALinear, PivotOrderLinear
from component.runner.layout import Scratch
from component.runner.ops import in_order, silu_product
from component.runner.stack import Stack

KINDS = ("dense", "low-rank, same density", "PIFA here", "PIFA here, folded")
STACKED_DENSE = "dense, stacked"
AnyLayer = nn.Linear | LowRankLinear | PIFALinear
Forward = Callable[[Tensor], Tensor]


def mlp(layers: Sequence[Forward], x: Tensor) -> Tensor:
    """layers: gate, up, down; x: (tokens, d_in) -> (tokens, d_in)"""
    gate, up, down = layers
    return down(F.silu(gate(x)) * up(x))


class MLPShape(NamedTuple):
    """gate's and up's shape, and down's."""

    into: Shape
    out: Shape

    @classmethod
    def at_density(cls, hidden: int, channels: int, density: float) -> "MLPShape":
        return cls(Shape.at_density(channels, hidden, density), Shape.at_density(hidden, channels, density))

    @property
    def labels(self) -> dict[str, Any]:
        into, out = self
        return {
            "hidden": into.d_in, "channels": into.d_out, "rank": into.rank, "rank_down": out.rank,
            "density": (2 * into.density + out.density) / 3,
        }  # fmt: skip


def random_linear(kind: str, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> AnyLayer:
    """A linear of one of KINDS; a folded one has the identity for its perm. No gradients."""
    like: dict[str, Any] = {"bias": False, "dtype": dtype, "device": device}
    layer: AnyLayer
    if kind == "dense":
        layer = nn.utils.skip_init(nn.Linear, shape.d_in, shape.d_out, **like)
    elif kind.startswith("low-rank"):
        layer = LowRankLinear(shape.d_in, shape.d_out, shape.low_rank, **like)
    elif kind.endswith("folded"):
        layer = PivotOrderLinear(shape.d_in, shape.d_out, shape.rank, **like)
        layer.perm.copy_(torch.arange(shape.d_out, device=device))
    else:
        layer = PIFALinear(shape.d_in, shape.d_out, shape.rank, **like)
        pivots, others = draw_pivots(shape, device)
        layer.perm.copy_(torch.cat([pivots, others]).argsort())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    return layer.requires_grad_(False)


def block_makers(shape: MLPShape, dtype: torch.dtype, device: torch.device) -> list[Maker]:
    """Every way to run the block, plain dense first."""
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    return [
        *(partial(plain_row, kind, shape, **like) for kind in KINDS[:2]),
        partial(published_row, shape, **like),
        *(partial(plain_row, kind, shape, **like) for kind in KINDS[2:]),
        *(partial(stacked_row, kind, shape, **like) for kind in KINDS),
        partial(two_four_block, shape, **like),
    ]


def plain_row(kind: str, shape: MLPShape, *, dtype: torch.dtype, device: torch.device) -> Row:
    """The three linears as modules, SiLU and product by PyTorch."""
    modules = _modules(kind, shape, dtype=dtype, device=device)
    return _row(kind, modules, partial(mlp, modules))


def published_row(shape: MLPShape, *, dtype: torch.dtype, device: torch.device) -> Row:
    modules = _modules(KINDS[2], shape, dtype=dtype, device=device)
    layers = [_as_published(module) for module in modules if isinstance(module, PIFALinear)]
    row = _row(PUBLISHED, modules, partial(mlp, [partial(published_pifa, layer=layer) for layer in layers]))
    stored = tuple(t for layer in layers for t in (layer.pivot, layer.coeff, layer.pivots, layer.others))
    return replace(row, tensors=stored)


def _as_published(layer: PIFALinear) -> Pivoted:
    columns = layer.perm.argsort()
    pivots, others = columns[: layer.rank], columns[layer.rank :]
    return Pivoted(pivot=layer.pivot.weight, coeff=layer.coeff.weight, perm=layer.perm, pivots=pivots, others=others)


def stacked_row(kind: str, shape: MLPShape, *, dtype: torch.dtype, device: torch.device) -> Row:
    """As the lean runner does it; down's outputs are put in order at the end, as the residual addition would."""
    modules = _modules(kind, shape, dtype=dtype, device=device)
    into, out, scratch = Stack(modules[:2]), Stack(modules[2:]), Scratch.on(device)

    def forward(x: Tensor) -> Tensor:
        return in_order(out(silu_product(into(x, scratch), into.layout), scratch), out.layout)

    return _row(f"{kind}, stacked", modules, forward)


def two_four_block(shape: MLPShape, *, dtype: torch.dtype, device: torch.device) -> Row:
    rows = [two_four_row(TWO_FOUR, one, dtype=dtype, device=device) for one in (shape.into, shape.into, shape.out)]
    if refused := [row.refused for row in rows if row.refused]:
        return Row(TWO_FOUR, refused=refused[0])
    forward, expected = (partial(mlp, [getattr(row, which) for row in rows]) for which in ("forward", "expected"))
    tensors = tuple(tensor for row in rows for tensor in row.tensors)
    return Row(
        TWO_FOUR,
        tensors,
        forward=forward,
        expected=expected,
        flops=sum(row.flops for row in rows),
        has_gradients=False,
        foreign=True,
    )


def _modules(kind: str, shape: MLPShape, *, dtype: torch.dtype, device: torch.device) -> list[AnyLayer]:
    """gate, up and down; of a folded block, down's outputs go to the residual stream and are put in order."""
    kinds = (kind, kind, kind.removesuffix(", folded"))
    both = zip(kinds, (shape.into, shape.into, shape.out), strict=True)
    return [random_linear(one, size, dtype=dtype, device=device) for one, size in both]


def _row(name: str, modules: list[AnyLayer], forward: Forward) -> Row:
    """A row of modules; what it stores are their tensors, though a stack may hold them in its own way."""

    def expected(x: Tensor) -> Tensor:
        return mlp([_wide(module) for module in modules], x)

    tensors = tuple(t for module in modules for t in module.state_dict().values())
    flops = 2 * sum(p.numel() for m in modules for p in m.parameters())
    return Row(name, tensors, forward=forward, expected=expected, flops=flops)


def _wide(module: AnyLayer) -> Forward:
    """The module in float64, by the plainest expressions."""
    if isinstance(module, PIFALinear):
        weight = torch.cat([module.pivot.weight.double(), module.coeff.weight.double() @ module.pivot.weight.double()])
        return partial(F.linear, weight=weight[module.perm.long()])
    if isinstance(module, LowRankLinear):
        return partial(F.linear, weight=module.u.weight.double() @ module.v.weight.double())
    return partial(F.linear, weight=module.weight.double())
