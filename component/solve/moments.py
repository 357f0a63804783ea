"""Second moments of a module's inputs in the two flows: all that the solvers see of the data."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS, LEAST_BLOCK = 4, 128  # of a symmetric product, and channels of a block: more and smaller ones are slower


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

    def of(self, name: str) -> Tensor:
        """The moment of this name. Raises: TypeError where nobody asked for it: see `Solver`."""
        moment = getattr(self, name)
        if moment is None:
            raise TypeError(f"no {name} was gathered")
        return moment


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left^T right, multiplied in float32 and summed in float64.

    left: (..., m), right: (..., n), any float dtype; total: (m, n) float64 or None for zero.
    """
    product = left.flatten(0, -2).float().T @ right.flatten(0, -2).float()
    return product.double() if total is None else total.add_(product)


def add_gram(total: Tensor | None, x: Tensor, weighted: Tensor | None = None) -> Tensor:
    """total + x^T W x with W the tokens' weights, as by `add_product`, for little more than half of the products.

    x, weighted: (..., d), any float dtype, weighted = W x or None where all weights are 1; total: (d, d) float64 or
    None for zero. Of the sum, which is symmetric, blocks above the diagonal are copies of those below.
    """
    left = x.flatten(0, -2).float()
    right = left if weighted is None else weighted.flatten(0, -2).float()
    size = left.shape[1]
    step = max(-(-size // BLOCKS), LEAST_BLOCK)
    product = left.new_empty(size, size)
    for start in range(0, size, step):
        here = slice(start, min(start + step, size))
        torch.mm(left[:, here].T, right[:, : here.stop], out=product[here, : here.stop])
        product[:start, here] = product[here, :start].T
    return product.double() if total is None else total.add_(product)


def add_magnitude(total: Tensor | None, x: Tensor) -> Tensor:
    """total + the sum of |x| over tokens, in float64. x: (..., d), any float dtype; total: (d,) or None for zero."""
    magnitude = x.flatten(0, -2).abs().sum(0, dtype=torch.float64)
    return magnitude if total is None else total.add_(magnitude)
