"""Which solver the flags ask for: the one place that turns --prune and --reconstruct_step into a function."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from component.moments import Moments
from component.reconstruction import alternating_factors, exact_factors, target_moment
from component.whitening import plain_factors, whitened_factors

PRUNERS = ("svd-llm", "svd")
EXACT = None  # --reconstruct_step left out


@dataclass(frozen=True)
class Solver:
    """solve(weight, moments, rank, name) -> u, v in float64, and which moments it reads."""

    solve: Callable[[Tensor, Moments, int, str], tuple[Tensor, Tensor]]
    needs_dense_gram: bool = False
    needs_gram: bool = False
    needs_cross: bool = False
    needs_drift: bool = False

    @property
    def needs_low_rank_flow(self) -> bool:
        return self.needs_gram or self.needs_cross


def default_step(prune: str) -> int | None:
    """The exact minimiser ignores the factors it starts from, so only svd-llm defaults to it; svd is left as it is."""
    return EXACT if prune == "svd-llm" else 0


def make_solver(
    prune: str,
    step: int | None,
    mix_ratio: float,
    drift_ratio: float = 0.0,
    weighting: Callable[[str], Tensor] | None = None,
) -> Solver:
    """prune: one of PRUNERS gives the factors; step: None exact M, 0 none, 1 U, 2 U then V, -1 V; mix_ratio: lambda.

    drift_ratio: rho; weighting: module name -> L_g, on any device, for the exact solver only.
    """

    def target_of(weight: Tensor, moments: Moments) -> Tensor:
        assert moments.gram is not None
        return target_moment(weight, moments.gram, moments.cross, mix_ratio, moments.drift, drift_ratio)

    def exact(weight: Tensor, moments: Moments, rank: int, name: str):
        assert moments.gram is not None
        left = None if weighting is None else weighting(name).to(weight.device)
        return exact_factors(weight, target_of(weight, moments), moments.gram, rank, weighting=left, what=name)

    def start(weight: Tensor, moments: Moments, rank: int, name: str):
        if prune == "svd":
            return plain_factors(weight, rank)
        assert moments.dense_gram is not None
        return whitened_factors(weight, moments.dense_gram, rank, name)

    def alternating(weight: Tensor, moments: Moments, rank: int, name: str):
        assert moments.gram is not None and step is not None
        factors = start(weight, moments, rank, name)
        return alternating_factors(weight, target_of(weight, moments), moments.gram, factors, step, name)

    whitened = prune == "svd-llm"
    if step == 0:
        return Solver(start, needs_dense_gram=whitened)
    flows = {"needs_gram": True, "needs_cross": mix_ratio > 0, "needs_drift": drift_ratio > 0}
    if step is EXACT:
        return Solver(exact, **flows)
    return Solver(alternating, needs_dense_gram=whitened, **flows)
