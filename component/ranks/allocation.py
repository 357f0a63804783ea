"""How many ranks each module gets: numbers in, numbers out.

An allocation is a function from a `Budget` to a plan; it never sees a model. To add one, write the function, in a file
of its own, and name it in ALLOCATIONS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from component.ranks.budget import Budget, Module, plan_of
from component.ranks.by_loss import asvd, by_loss
from component.ranks.sizes import Plan
from utils.errors import UsageError

OWL_BAND = 0.08  # lambda of OWL
DEPTH_SLOPE = 0.2  # beta of ATP: from 0.1 above the density in the first layer to 0.1 below it in the last
DEPTH_FLOOR = 0.3  # of the density, which no layer falls below
LEAST_SHARE = 1e-6  # below it a module gets no rank, which is an error that says so
SCALE_BISECTIONS = 100


def uniform(budget: Budget) -> Plan:
    """The same density for every module."""
    return plan_of(budget, lambda module: budget.density)


def by_type(budget: Budget) -> Plan:
    """One density for attention, and for the MLP the one that keeps the whole at the density asked (PIFA, B.2)."""
    attention = budget.density if budget.attention_density is None else budget.attention_density
    mlp = mlp_density(budget.modules, budget.density, attention)
    return plan_of(budget, lambda module: attention if module.attention else mlp)


def owl(budget: Budget) -> Plan:
    """More for layers with more outlier weights (OWL, arXiv 2310.05175), within a band of +-0.08 around the density.

    Multiplied with the type densities over the whole one where the user gave --attn_ratio: the paper's MPIFA_NS.
    """
    scores = np.asarray(budget.outliers, dtype=float)
    spread = scores.max() - scores.min()
    shifts = (scores - scores.min()) / spread * 2 * OWL_BAND if spread > 0 else np.zeros_like(scores)
    by_layer = budget.density + shifts - shifts.mean()
    attention = mlp = 1.0
    if budget.attention_density is not None:
        attention = budget.attention_density / budget.density
        mlp = mlp_density(budget.modules, budget.density, budget.attention_density) / budget.density
    return _balanced(budget, lambda module: by_layer[module.layer] * (attention if module.attention else mlp))


def iprs(budget: Budget) -> Plan:
    """In proportion to the influence of the block, capped at dense (FLAT-LLM, arXiv 2505.23966)."""
    return _balanced(budget, lambda module: budget.influence[module.layer])


def atp(budget: Budget, slope: float = DEPTH_SLOPE) -> Plan:
    """Along a line that falls with depth (ATP, arXiv 2502.14770): early errors pass through more layers.

    slope: how far the first layer's density is above the last one's, before all are kept within 0.3 of the whole one
    and 1, and scaled to meet it. ATP searches for it; the default is a moderate one.
    """
    last = max(module.layer for module in budget.modules)
    line = budget.density + slope * (0.5 - np.arange(last + 1) / max(last, 1))
    by_layer = line.clip(DEPTH_FLOOR * budget.density, 1)
    return _balanced(budget, lambda module: by_layer[module.layer])


def _balanced(budget: Budget, share_of: Callable[[Module], float]) -> Plan:
    densities = balanced(budget, share_of)
    return plan_of(budget, lambda module: densities[module.name])


def balanced(budget: Budget, share_of: Callable[[Module], float]) -> dict[str, float]:
    """Densities in proportion to the shares, none above 1, scaled until the whole is at the density asked."""
    numbers = np.array([module.numbers for module in budget.modules], dtype=float)
    shares = np.array([share_of(module) for module in budget.modules], dtype=float)
    low, high = 0.0, 1.0 / max(shares.min(), LEAST_SHARE)
    for _ in range(SCALE_BISECTIONS):
        scale = (low + high) / 2
        fits = (np.minimum(scale * shares, 1) @ numbers) <= budget.density * numbers.sum()
        low, high = (scale, high) if fits else (low, scale)
    return dict(zip((module.name for module in budget.modules), np.minimum(low * shares, 1).tolist(), strict=True))


def mlp_density(modules: Sequence[Module], density: float, attention_density: float) -> float:
    """The rho_m in rho (A + M) = rho_a A + rho_m M, with A and M counted from the modules' own shapes.

    Raises: UsageError where that is no density in (0, 1], or where there is only one type.
    """
    least, most = attention_range(modules, density)
    attention = sum(module.numbers for module in modules if module.attention)
    mlp = sum(module.numbers for module in modules if not module.attention)
    result = (density * (attention + mlp) - attention_density * attention) / mlp
    if not 0 < result <= 1 + 1e-9:  # the slack is for rounding at exactly 1
        raise UsageError(
            f"no MLP density balances --attn_ratio {1 - attention_density:g} at density {density:g}; "
            f"an attention ratio between {1 - most:.3f} and {1 - least:.3f} would"
        )
    return min(result, 1.0)


def attention_range(modules: Sequence[Module], density: float) -> tuple[float, float]:
    """The attention densities that an MLP density from 1 down to 0 balances.

    Raises: UsageError where there is only one type.
    """
    attention = sum(module.numbers for module in modules if module.attention)
    mlp = sum(module.numbers for module in modules if not module.attention)
    if not attention or not mlp:
        raise UsageError("type and --attn_ratio need a model with linears both in attention and outside of it")
    total = density * (attention + mlp)
    return max(0.0, (total - mlp) / attention), min(1.0, total / attention)


@dataclass(frozen=True)
class Allocation:
    """share_out: Budget -> Plan. profiled: whether it reads what the profile measures."""

    share_out: Callable[[Budget], Plan]
    profiled: bool = False


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation(uniform),
    "type": Allocation(by_type),
    "atp": Allocation(atp),
    "owl": Allocation(owl, profiled=True),
    "iprs": Allocation(iprs, profiled=True),
    "asvd": Allocation(asvd, profiled=True),
    "kl": Allocation(by_loss, profiled=True),
}


def reads_profile(name: str) -> bool:
    """Whether the allocation of this name does; a plan's file does not."""
    return name in ALLOCATIONS and ALLOCATIONS[name].profiled
