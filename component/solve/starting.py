"""Solvers that look at the dense flow alone, or at no data: --reconstruct_step 0, and where the other steps start."""

from dataclasses import dataclass

from torch import Tensor

from component.solve.moments import Moments
from component.solve.solver import Factors, Solver
from component.solve.whitening import plain_factors, scaled_factors, whitened_factors


@dataclass(frozen=True)
class Whitened(Solver):
    """SVD-LLM's W."""

    needs_dense_gram = True

    def solve(self, weight: Tensor, moments: Moments, rank: int, *, what: str) -> Factors:
        return whitened_factors(weight, moments.of("dense_gram"), rank, what=what)


@dataclass(frozen=True)
class Scaled(Solver):
    """ASVD."""

    needs_dense_magnitude = True

    def solve(self, weight: Tensor, moments: Moments, rank: int, *, what: str) -> Factors:
        return scaled_factors(weight, moments.of("dense_magnitude"), rank, what=what)


@dataclass(frozen=True)
class Plain(Solver):
    """SVD of the weight."""

    def solve(self, weight: Tensor, moments: Moments, rank: int, *, what: str) -> Factors:
        return plain_factors(weight, rank)
