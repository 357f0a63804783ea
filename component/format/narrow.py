"""Linears next to attention whose value heads are narrower than head_dim (see flatllm.py), as a checkpoint has them.

This file travels inside every checkpoint that needs it (see integration.py), so it imports nothing but torch.

Attention itself is left alone: it gets heads of the width it expects, whose last channels are zero. Sums over tokens
keep them zero, so the output projection can leave them out. Neither layer multiplies by a zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Narrow(nn.Module):
    """A weight and a bias of the shapes that are stored; in_features and out_features are those that others see.

    The constructor allocates only (it works on the meta device). A loader that does not know the format builds
    nn.Linear, finds a weight of the wrong shape and stops.

    Raises: ValueError where heads do not divide the features, or width is outside 1..head_dim.
    """

    def __init__(self, in_features, out_features, heads, width, shape, bias, device, dtype):
        super().__init__()
        self.in_features, self.out_features, self.heads, self.width = in_features, out_features, heads, width
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, heads={self.heads}, "
            f"width={self.width}, bias={self.bias is not None}"
        )


class PaddedHeads(_Narrow):
    """y = W' x + b' with `width` channels per head, and zeros behind them up to head_dim.

    W': (heads * width, d_in), b': (heads * width,).
    """

    def __init__(self, in_features, out_features, heads, width, bias=True, device=None, dtype=None):
        self.head_dim = _head_dim(out_features, heads, width)
        super().__init__(in_features, out_features, heads, width, (heads * width, in_features), bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._padded(F.linear(x, self.weight, self.bias))

    def dense_weight(self) -> Tensor:
        """(d_out, d_in), with rows of zeros."""
        return self._padded(self.weight.T).T.contiguous()

    def dense_bias(self) -> Tensor | None:
        return None if self.bias is None else self._padded(self.bias)

    def _padded(self, y: Tensor) -> Tensor:
        return F.pad(y.unflatten(-1, (self.heads, self.width)), (0, self.head_dim - self.width)).flatten(-2)


class PickedHeads(_Narrow):
    """y = W' x' + b, where x' are the first `width` channels of each head of x. W': (d_out, heads * width)."""

    def __init__(self, in_features, out_features, heads, width, bias=True, device=None, dtype=None):
        self.head_dim = _head_dim(in_features, heads, width)
        super().__init__(in_features, out_features, heads, width, (out_features, heads * width), bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        picked = x.unflatten(-1, (self.heads, self.head_dim))[..., : self.width].flatten(-2)
        return F.linear(picked, self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        """(d_out, d_in), with columns of zeros."""
        blocks = self.weight.unflatten(-1, (self.heads, self.width))
        return F.pad(blocks, (0, self.head_dim - self.width)).flatten(-2)

    def dense_bias(self) -> Tensor | None:
        return self.bias


def _head_dim(features: int, heads: int, width: int) -> int:
    head_dim, rest = divmod(features, heads)
    if rest or not 1 <= width <= head_dim:
        raise ValueError(f"{heads} heads of {width} channels do not fit into {features} features")
    return head_dim
