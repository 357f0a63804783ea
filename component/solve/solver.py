"""What the walk through the layers asks of a solver: which moments it reads, and the factors that it makes of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from component.solve.moments import Moments
from component.solve.reconstruction import target_moment

Factors = tuple[Tensor, Tensor]  # u: (d_out, r) and v: (r, d_in), float64


class Solver(Protocol):
    """A solver inherits from this and says what differs: `solve` always, and each moment that it reads.

    Moments that no solver asks for are None (moments.py).
    """

    @property
    def needs_dense_gram(self) -> bool:
        return False

    @property
    def needs_dense_magnitude(self) -> bool:
        return False

    @property
    def needs_gram(self) -> bool:
        return False

    @property
    def needs_cross(self) -> bool:
        return False

    @property
    def needs_drift(self) -> bool:
        return False

    @property
    def needs_dense_flow(self) -> bool:
        """Whether it reads moments of the dense flow alone, which come from the windows for whitening."""
        return self.needs_dense_gram or self.needs_dense_magnitude

    @property
    def needs_low_rank_flow(self) -> bool:
        return self.needs_gram or self.needs_cross

    @property
    def token_weights(self) -> Callable[[str], Tensor] | None:
        """Name -> (windows, length), how much each token counts in the two-flow moments of a group of linears.

        The group is named by its first. None where all count the same.
        """
        return None

    def solve(self, weight: Tensor, moments: Moments, rank: int, *, what: str) -> Factors:
        """weight: (d_out, d_in); rank: r; what: the module's full name, for errors. Returns u and v, float64."""

    def target(self, weight: Tensor, moments: Moments) -> Tensor:
        """Y_t X_u^T: (d_out, d_in), what a reconstruction aims at. Raises: TypeError of a solver that has none."""
        raise TypeError(f"{type(self).__name__} reconstructs nothing")


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Solver):
    """A solver that fits a module to a mixture of both flows: see `target_moment`.

    mix_ratio: lambda; drift_ratio: rho; token_weights: see Solver.
    """

    needs_gram = True

    mix_ratio: float
    drift_ratio: float = 0.0
    token_weights: Callable[[str], Tensor] | None = None

    @property
    def needs_cross(self) -> bool:
        return self.mix_ratio > 0

    @property
    def needs_drift(self) -> bool:
        return self.drift_ratio > 0

    def target(self, weight: Tensor, moments: Moments) -> Tensor:
        return target_moment(
            weight,
            moments.of("gram"),
            moments.cross,
            mix_ratio=self.mix_ratio,
            drift=moments.drift,
            drift_ratio=self.drift_ratio,
        )
