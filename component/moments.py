"""Second moments of a module's inputs in the two flows: all that the solvers see of the data."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over tokens, float64; None where the solver does not ask for it, or the module has none.

    (d_in, d_in) each: gram: G = X_u X_u^T of the low-rank flow. cross: C = X_o X_u^T. dense_gram: X_o X_o^T of the
    dense flow. drift: (H_o - H_u) X_u^T, (width, d_in), with H the residual stream that the module writes into.
    dense_magnitude: (d_in,), the sum of |x| of the dense flow by channel.
    """

    gram: Tensor | None = None
    cross: Tensor | None = None
    dense_gram: Tensor | None = None
    drift: Tensor | None = None
    dense_magnitude: Tensor | None = None


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left^T right, multiplied in float32 and summed in float64.

    left: (..., m), right: (..., n), any float dtype; total: (m, n) float64 or None for zero.
    """
    product = left.flatten(0, -2).float().T @ right.flatten(0, -2).float()
    return product.double() if total is None else total.add_(product)


def add_magnitude(total: Tensor | None, x: Tensor) -> Tensor:
    """total + the sum of |x| over tokens, in float64. x: (..., d), any float dtype; total: (d,) or None for zero."""
    magnitude = x.flatten(0, -2).abs().sum(0, dtype=torch.float64)
    return magnitude if total is None else total.add_(magnitude)


def full_precision() -> contextlib.AbstractContextManager[None]:
    """No TF32 inside: rounding of the inputs to 10 bits would be the largest error of all."""
    return matmul_precision("highest")


@contextlib.contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """Float32 products inside at this of torch's levels; as they were after it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
