"""A solver that does as a test says."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from component.solve.moments import Moments
from component.solve.solver import Factors, Solver

NEEDS = ("needs_dense_gram", "needs_dense_magnitude", "needs_gram", "needs_cross", "needs_drift")


@dataclass(frozen=True)
class Scripted(Solver):
    """how: (weight, moments, rank, name) -> u, v."""

    how: Callable[[Tensor, Moments, int, str], Factors]
    needs_dense_gram: bool = False
    needs_dense_magnitude: bool = False
    needs_gram: bool = False
    needs_cross: bool = False
    needs_drift: bool = False
    token_weights: Callable[[str], Tensor] | None = None

    def solve(self, weight: Tensor, moments: Moments, rank: int, *, what: str) -> Factors:
        return self.how(weight, moments, rank, what)
