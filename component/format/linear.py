"""The two linear layers that a compressed model is made of.

This file travels inside every checkpoint (see integration.py), so it imports nothing but torch and its neighbour.
"""

import torch
from torch import Tensor, nn

from .kernels import pifa_linear, pivoted_product, reorder


class FactoredLinear(nn.Module):
    """What both layers share: sizes, an optional bias, and a sentinel.

    The sentinel `weight`, of shape (0,), is stored with the layer. A loader that does not know the format builds
    nn.Linear, finds a weight of the wrong shape and stops, where it would otherwise start from random numbers.
    """

    weight: Tensor

    def __init__(self, in_features, out_features, rank, bias=True, device=None, dtype=None):
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank {rank} is outside 1..{min(in_features, out_features)}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


class LowRankLinear(FactoredLinear):
    """y = U V x + b with U: (d_out, r) in `u.weight` and V: (r, d_in) in `v.weight`.

    The constructor allocates only (it works on the meta device); `from_factors` fills.

    Raises: ValueError for a rank outside 1..min(d_in, d_out).
    """

    def __init__(self, in_features, out_features, rank, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, rank, bias, device, dtype)
        self.v = _allocate(in_features, rank, device, dtype)
        self.u = _allocate(rank, out_features, device, dtype)

    @classmethod
    def from_factors(cls, u: Tensor, v: Tensor, bias: Tensor | None, dtype: torch.dtype) -> "LowRankLinear":
        """u: (d_out, r), v: (r, d_in), bias: (d_out,) or None; stored as `dtype` on u's device."""
        layer = cls(v.shape[1], u.shape[0], u.shape[1], bias is not None, u.device, dtype)
        _fill({layer.u.weight: u, layer.v.weight: v, layer.bias: bias})
        return layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.u(self.v(x))
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        """U V: (d_out, d_in), multiplied in float32 or better, in the layer's dtype."""
        return _product(self.u.weight, self.v.weight)


class PIFALinear(FactoredLinear):
    """A rank-r linear stored as r of its own rows and the coefficients of all others (PIFA, arXiv 2501.19090, Sec. 3).

    y_p = W_p x, y_np = C y_p, y = [y_p | y_np] put in order by `perm`, plus the bias. W_p: (r, d_in) in
    `pivot.weight`, C: (d_out - r, r) in `coeff.weight`, `perm`: (d_out,) int32, output j is column perm[j] of
    [y_p | y_np]. `perm` is read at every call, so a changed one counts. `pivot` and `coeff` may be replaced or hooked,
    by an adapter say; they are called as modules then, and otherwise their weights go to kernels.py.

    The constructor allocates only (it works on the meta device); `from_pivots` fills.

    Raises: ValueError for a rank outside 1..min(d_in, d_out).
    """

    perm: Tensor

    def __init__(self, in_features, out_features, rank, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, rank, bias, device, dtype)
        self.pivot = _allocate(in_features, rank, device, dtype)
        self.coeff = _allocate(rank, out_features - rank, device, dtype)
        self.register_buffer("perm", torch.empty(out_features, device=device, dtype=torch.int32))

    @classmethod
    def from_pivots(
        cls, pivot_rows: Tensor, coefficients: Tensor, perm: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> "PIFALinear":
        """pivot_rows: (r, d_in), coefficients: (d_out - r, r), perm: (d_out,), bias: (d_out,) or None."""
        rank, d_in = pivot_rows.shape
        layer = cls(d_in, rank + coefficients.shape[0], rank, bias is not None, pivot_rows.device, dtype)
        _fill({layer.pivot.weight: pivot_rows, layer.coeff.weight: coefficients, layer.perm: perm, layer.bias: bias})
        return layer

    def forward(self, x: Tensor) -> Tensor:
        pivot, coeff = self.pivot, self.coeff
        if _are_plain(pivot, coeff, x):
            return pifa_linear(x, pivot.weight, coeff.weight, self.perm, self.bias)
        y = _by_modules(pivot, coeff, x)
        return reorder(y, self.perm, None if self.bias is None else self.bias.to(y.dtype))

    def dense_weight(self) -> Tensor:
        """The (d_out, d_in) matrix, multiplied in float32 or better, in the layer's dtype."""
        others = _product(self.coeff.weight, self.pivot.weight)
        return torch.cat([self.pivot.weight, others]).index_select(0, self.perm)


class PivotOrderLinear(PIFALinear):
    """A pivoted linear of a folded checkpoint: its perm is the identity, so that outputs go on as they come."""

    def forward(self, x: Tensor) -> Tensor:
        pivot, coeff = self.pivot, self.coeff
        if _are_plain(pivot, coeff, x):
            return pivoted_product(x, pivot.weight, coeff.weight, self.bias)
        y = _by_modules(pivot, coeff, x)
        return y if self.bias is None else y + self.bias


def _allocate(in_features, out_features, device, dtype) -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False, device=device or "cpu", dtype=dtype)


def _are_plain(pivot: nn.Module, coeff: nn.Module, x: Tensor) -> bool:
    """Whether the two products are those of the weights, as kernels.py computes them."""
    return _is_bare(pivot) and _is_bare(coeff) and not torch.is_autocast_enabled(x.device.type)


def _by_modules(pivot: nn.Module, coeff: nn.Module, x: Tensor) -> Tensor:
    """[y_p | y_np] through whatever the two modules have become."""
    y_pivot = pivot(x)
    return torch.cat([y_pivot, coeff(y_pivot)], dim=-1)


def _is_bare(linear: nn.Module) -> bool:
    """Whether to call it is to multiply by its weight: an nn.Linear of plain tensors that nobody replaced or hooked."""
    if type(linear) is not nn.Linear:
        return False
    own = vars(linear)  # attributes of a module are slow to look up
    weight, bias = (own["_parameters"].get(name) for name in ("weight", "bias"))
    return (
        type(weight) in (nn.Parameter, Tensor)
        and bias is None
        and "forward" not in own
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and not (own["_backward_hooks"] or own["_backward_pre_hooks"])
    )


@torch.no_grad()
def _fill(values) -> None:
    for target, value in values.items():
        if target is not None:
            target.copy_(value)


def _product(left: Tensor, right: Tensor) -> Tensor:
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide) @ right.to(wide)).to(left.dtype)
