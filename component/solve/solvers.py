"""Which solver the flags ask for: the one place that turns --prune and --reconstruct_step into a function."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from component.solve.moments import Moments
from component.solve.names import EXACT, NARROWING
from component.solve.reconstruction import EXACT_DAMPING, alternating_factors, exact_factors, target_moment
from component.solve.whitening import plain_factors, scaled_factors, whitened_factors


@dataclass(frozen=True)
class Solver:
    """solve(weight, moments, rank, name) -> u, v in float64, and which moments it reads.

    target(weight, moments) -> Y_t X_u^T, what a reconstruction aims at; None where there is none.
    token_weights: name -> (windows, length), how much each token counts in the two-flow moments of a group of linears,
    named by its first; None where all count the same.
    """

    solve: Callable[[Tensor, Moments, int, str], tuple[Tensor, Tensor]]
    needs_dense_gram: bool = False
    needs_gram: bool = False
    needs_cross: bool = False
    needs_drift: bool = False
    needs_dense_magnitude: bool = False
    token_weights: Callable[[str], Tensor] | None = None
    target: Callable[[Tensor, Moments], Tensor] | None = None

    @property
    def needs_dense_flow(self) -> bool:
        """Whether it reads moments of the dense flow alone, which come from the windows for whitening."""
        return self.needs_dense_gram or self.needs_dense_magnitude

    @property
    def needs_low_rank_flow(self) -> bool:
        return self.needs_gram or self.needs_cross


def _no_factors(weight: Tensor, moments: Moments, rank: int, name: str) -> tuple[Tensor, Tensor]:
    raise TypeError(f"{name}: {NARROWING} makes no factors")


def make_solver(
    prune: str,
    step: int | None,
    mix_ratio: float,
    *,
    drift_ratio: float = 0.0,
    ridge: float = EXACT_DAMPING,
    weighting: Callable[[str], Tensor] | None = None,
    token_weights: Callable[[str], Tensor] | None = None,
) -> Solver:
    """prune: one of FACTORING gives the factors, AUTO those of svd-llm, and NARROWING only names the moments it reads;
    step: None exact M, 0 none, 1 U, 2 U then V, -1 V; mix_ratio: lambda.

    drift_ratio: rho; ridge: mu of the exact solver; weighting: module name -> L_g, on any device, for the exact solver
    only; token_weights: see Solver.
    """

    if prune == NARROWING:
        return Solver(_no_factors, needs_gram=True, needs_cross=mix_ratio > 0)

    def target_of(weight: Tensor, moments: Moments) -> Tensor:
        assert moments.gram is not None
        return target_moment(
            weight, moments.gram, moments.cross, mix_ratio=mix_ratio, drift=moments.drift, drift_ratio=drift_ratio
        )

    def exact(weight: Tensor, moments: Moments, rank: int, name: str):
        assert moments.gram is not None
        left = None if weighting is None else weighting(name).to(weight.device)
        return exact_factors(
            weight, target_of(weight, moments), moments.gram, rank=rank, damping=ridge, weighting=left, what=name
        )

    def start(weight: Tensor, moments: Moments, rank: int, name: str):
        if prune == "svd":
            return plain_factors(weight, rank)
        if prune == "asvd":
            assert moments.dense_magnitude is not None
            return scaled_factors(weight, moments.dense_magnitude, rank, what=name)
        assert moments.dense_gram is not None
        return whitened_factors(weight, moments.dense_gram, rank, what=name)

    def alternating(weight: Tensor, moments: Moments, rank: int, name: str):
        assert moments.gram is not None and step is not None
        factors = start(weight, moments, rank, name)
        return alternating_factors(
            weight, target_of(weight, moments), moments.gram, start=factors, step=step, what=name
        )

    starts = step is not EXACT  # which ignores the factors to start from
    whitened, scaled = starts and prune == "svd-llm", starts and prune == "asvd"
    if step == 0:
        return Solver(start, needs_dense_gram=whitened, needs_dense_magnitude=scaled)
    return Solver(
        exact if step is EXACT else alternating,
        needs_dense_gram=whitened,
        needs_dense_magnitude=scaled,
        needs_gram=True,
        needs_cross=mix_ratio > 0,
        needs_drift=drift_ratio > 0,
        token_weights=token_weights,
        target=target_of,
    )
