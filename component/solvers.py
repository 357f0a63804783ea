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

    @property
    def needs_low_rank_flow(self) -> bool:
        return self.needs_gram or self.needs_cross


def default_step(prune: str) -> int | None:
    """The exact minimiser ignores the factors it starts from, so only svd-llm defaults to it; svd is left as it is."""
    return EXACT if prune == "svd-llm" else 0


def make_solver(prune: str, step: int | None, mix_ratio: float) -> Solver:
    """prune: one of PRUNERS gives the factors; step: None exact M, 0 none, 1 U, 2 U then V, -1 V; mix_ratio: lambda."""
    use_cross = mix_ratio > 0

    def exact(weight: Tensor, moments: Moments, rank: int, name: str):
        assert moments.gram is not None
        target = target_moment(weight, moments.gram, moments.cross, mix_ratio)
        return exact_factors(weight, target, moments.gram, rank, what=name)

    def start(weight: Tensor, moments: Moments, rank: int, name: str):
        if prune == "svd":
            return plain_factors(weight, rank)
        assert moments.dense_gram is not None
        return whitened_factors(weight, moments.dense_gram, rank, name)

    def alternating(weight: Tensor, moments: Moments, rank: int, name: str):
        assert moments.gram is not None and step is not None
        target = target_moment(weight, moments.gram, moments.cross, mix_ratio)
        factors = start(weight, moments, rank, name)
        return alternating_factors(weight, target, moments.gram, factors, step, name)

    if step is EXACT:
        return Solver(exact, needs_gram=True, needs_cross=use_cross)
    whitened = prune == "svd-llm"
    if step == 0:
        return Solver(start, needs_dense_gram=whitened)
    return Solver(alternating, needs_dense_gram=whitened, needs_gram=True, needs_cross=use_cross)
