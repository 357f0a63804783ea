"""Which solver the flags ask for. To add one, write its class in a file of its own and name it in SOLVERS.

names.py, which the front door reads, has the same names; a test holds the two together.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from component.solve.moments import Moments
from component.solve.names import EXACT, NARROWING
from component.solve.reconstructing import Alternating, Exact
from component.solve.reconstruction import EXACT_DAMPING
from component.solve.solver import Factors, Reconstruction, Solver
from component.solve.starting import Plain, Scaled, Whitened

SOLVERS: dict[str, Callable[[], Solver]] = {"svd-llm": Whitened, "svd": Plain, "asvd": Scaled}  # --prune -> its own


@dataclass(frozen=True, kw_only=True)
class Factorless(Reconstruction):
    """Says which moments fewer channels are fitted to (channels/narrowing.py)."""

    def solve(self, weight: Tensor, moments: Moments, rank: int, *, what: str) -> Factors:
        raise TypeError(f"{what}: {NARROWING} makes no factors")


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
    """prune: of names.py; step: None exact M, whatever `prune` would start from, 0 none, 1 U, 2 U then V, -1 V.

    mix_ratio: lambda; drift_ratio: rho; ridge, weighting: of the exact solver only; token_weights: see Solver.
    """
    if prune == NARROWING:
        return Factorless(mix_ratio=mix_ratio)
    if step is EXACT:
        return Exact(
            mix_ratio=mix_ratio,
            drift_ratio=drift_ratio,
            token_weights=token_weights,
            ridge=ridge,
            weighting=weighting,
        )
    start = SOLVERS[prune]()
    if step == 0:
        return start
    return Alternating(
        start=start, step=step, mix_ratio=mix_ratio, drift_ratio=drift_ratio, token_weights=token_weights
    )
