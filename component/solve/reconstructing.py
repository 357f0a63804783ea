"""Solvers that read both flows: the exact minimiser, and the paper's alternating steps."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from component.solve.moments import Moments
from component.solve.reconstruction import EXACT_DAMPING, alternating_factors, exact_factors
from component.solve.solver import Factors, Reconstruction, Solver


@dataclass(frozen=True, kw_only=True)
class Exact(Reconstruction):
    """Exact M. ridge: mu; weighting: module name -> L_g, on any device, or None."""

    ridge: float = EXACT_DAMPING
    weighting: Callable[[str], Tensor] | None = None

    def solve(self, weight: Tensor, moments: Moments, rank: int, *, what: str) -> Factors:
        left = None if self.weighting is None else self.weighting(what).to(weight.device)
        target, gram = self.target(weight, moments), moments.of("gram")
        return exact_factors(weight, target, gram, rank=rank, damping=self.ridge, weighting=left, what=what)


@dataclass(frozen=True, kw_only=True)
class Alternating(Reconstruction):
    """The paper's M from the factors of `start`. step: 1 updates U, 2 U then V, -1 V alone."""

    start: Solver
    step: int

    @property
    def needs_dense_gram(self) -> bool:
        return self.start.needs_dense_gram

    @property
    def needs_dense_magnitude(self) -> bool:
        return self.start.needs_dense_magnitude

    def solve(self, weight: Tensor, moments: Moments, rank: int, *, what: str) -> Factors:
        factors = self.start.solve(weight, moments, rank, what=what)
        target, gram = self.target(weight, moments), moments.of("gram")
        return alternating_factors(weight, target, gram, start=factors, step=self.step, what=what)
