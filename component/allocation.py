"""How many ranks each module gets: numbers in, numbers out.

An allocation is a function from a `Budget` to a plan; it never sees a model. To add one, write the function and
name it in ALLOCATIONS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from component.cost import StorageFormat
from utils.errors import UsageError

OWL_BAND = 0.08  # lambda of OWL
LEAST_SHARE = 1e-6  # below it a module gets no rank, which is an error that says so
RANK_FLOOR = 0.3  # of the uniform rank
PRICE_BISECTIONS = 100
MOST_PRICE = 1e30

Plan = dict[str, int | None]  # module name -> rank, None where the module stays dense


@dataclass(frozen=True)
class Module:
    """A linear of decoder layer number `layer`; `attention` tells its type for allocations that treat the two apart."""

    name: str
    d_out: int
    d_in: int
    attention: bool
    layer: int = 0

    @property
    def numbers(self) -> int:
        return self.d_out * self.d_in


@dataclass(frozen=True)
class Budget:
    """What an allocation decides on: modules in model order, the density asked, the format that is paid for.

    attention_density is None unless the user gave --attn_ratio. From the profile, where an allocation asks for them:
    curves, by module, the expected loss at every rank from 0 to min(d_out, d_in); by layer, the share of outlier
    weights, and the influence of the block (how far it turns the hidden states).
    """

    modules: Sequence[Module]
    density: float
    storage: StorageFormat
    attention_density: float | None = None
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    outliers: Sequence[float] = ()
    influence: Sequence[float] = ()


def uniform(budget: Budget) -> Plan:
    """The same density for every module."""
    return _plan(budget, lambda module: budget.density)


def by_type(budget: Budget) -> Plan:
    """One density for attention, and for the MLP the one that keeps the whole at the density asked (PIFA, B.2)."""
    attention = budget.density if budget.attention_density is None else budget.attention_density
    mlp = mlp_density(budget.modules, budget.density, attention)
    return _plan(budget, lambda module: attention if module.attention else mlp)


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


def _balanced(budget: Budget, share_of: Callable[[Module], float]) -> Plan:
    """Densities in proportion to the shares, none above 1, scaled until the whole is at the density asked."""
    numbers = np.array([module.numbers for module in budget.modules], dtype=float)
    shares = np.array([share_of(module) for module in budget.modules], dtype=float)
    low, high = 0.0, 1.0 / max(shares.min(), LEAST_SHARE)
    for _ in range(PRICE_BISECTIONS):
        scale = (low + high) / 2
        fits = (np.minimum(scale * shares, 1) @ numbers) <= budget.density * numbers.sum()
        low, high = (scale, high) if fits else (low, scale)
    densities = dict(zip((module.name for module in budget.modules), np.minimum(low * shares, 1), strict=True))
    return _plan(budget, lambda module: float(densities[module.name]))


def mlp_density(modules: Sequence[Module], density: float, attention_density: float) -> float:
    """The rho_m in rho (A + M) = rho_a A + rho_m M, with A and M counted from the modules' own shapes.

    Raises: UsageError where that is no density in (0, 1], or where there is only one type.
    """
    attention = sum(module.numbers for module in modules if module.attention)
    mlp = sum(module.numbers for module in modules if not module.attention)
    if not attention or not mlp:
        raise UsageError("--attn_ratio needs a model with linears both in attention and outside of it")
    result = (density * (attention + mlp) - attention_density * attention) / mlp
    if not 0 < result <= 1 + 1e-9:  # the slack is for rounding at exactly 1
        least = max(0.0, (density * (attention + mlp) - mlp) / attention)
        most = min(1.0, density * (attention + mlp) / attention)
        raise UsageError(
            f"no MLP density balances --attn_ratio {1 - attention_density:g} at density {density:g}; "
            f"an attention ratio between {1 - most:.3f} and {1 - least:.3f} would"
        )
    return min(result, 1.0)


def _plan(budget: Budget, density_of: Callable[[Module], float]) -> Plan:
    plan: Plan = {}
    for module in budget.modules:
        # a hair above the product: 0.3 * 10 is 3.0000000000000004 or 2.9999999999999996, by luck
        numbers = density_of(module) * module.numbers * (1 + 1e-12)
        rank = budget.storage.rank_for(numbers, module.d_out, module.d_in)
        if rank == 0:
            least = budget.storage.numbers(1, module.d_out, module.d_in) / module.numbers
            raise UsageError(
                f"density {density_of(module):.4g} leaves {module.name} no rank at all; it needs at least {least:.4f}"
            )
        plan[module.name] = rank
    return plan


class Choices(NamedTuple):
    """What one module can become: ranks (dense, the last, as its full rank), loss and stored numbers of each."""

    ranks: np.ndarray
    losses: np.ndarray
    numbers: np.ndarray


def by_loss(budget: Budget) -> Plan:
    """The ranks of least total expected loss within the budget, over the true storage cost, dense included.

    The cost is concave in the rank and the loss convex, so the best plans are mixed: some modules dense, others low.
    Lagrangian bisection finds the price at which every module, choosing for itself, fits the budget; what is left
    over buys the best affordable upgrades. No module falls below a share of its uniform rank: the loss of a module
    alone says too little about extreme ranks (LEMS uses the same floor).
    """
    total = budget.density * sum(module.numbers for module in budget.modules) * (1 + 1e-12)
    floors = uniform(budget)
    choices = {module.name: _choices(module, floors[module.name], budget) for module in budget.modules}
    low, high = 0.0, 1.0
    while _spent(choices, _at_price(choices, high)) > total:
        low, high = high, high * 16
        if high > MOST_PRICE:
            raise UsageError(f"no ranks fit density {budget.density:g}: ask for more")
    for _ in range(PRICE_BISECTIONS):
        price = (low + high) / 2
        low, high = (price, high) if _spent(choices, _at_price(choices, price)) > total else (low, price)
    chosen = _at_price(choices, high)
    _spend_rest(choices, chosen, total - _spent(choices, chosen))
    plan: Plan = {}
    for module in budget.modules:
        options = choices[module.name]
        dense = chosen[module.name] == len(options.ranks) - 1
        plan[module.name] = None if dense else int(options.ranks[chosen[module.name]])
    return plan


def _choices(module: Module, floor: int | None, budget: Budget) -> Choices:
    full = min(module.d_out, module.d_in)
    least = full if floor is None else max(1, int(RANK_FLOOR * floor))
    ranks = np.arange(min(least, full - 1), full)
    numbers = np.array([budget.storage.numbers(int(rank), module.d_out, module.d_in) for rank in ranks], dtype=float)
    pays = numbers < module.numbers
    curve = np.asarray(budget.curves[module.name], dtype=float)
    return Choices(
        np.append(ranks[pays], full), np.append(curve[ranks[pays]], 0.0), np.append(numbers[pays], module.numbers)
    )


def _at_price(choices: Mapping[str, Choices], price: float) -> dict[str, int]:
    # losses per token are small and numbers are millions: the price is per million
    return {name: int(np.argmin(c.losses + price * 1e-6 * c.numbers)) for name, c in choices.items()}


def _spent(choices: Mapping[str, Choices], chosen: Mapping[str, int]) -> float:
    return sum(c.numbers[chosen[name]] for name, c in choices.items())


def _spend_rest(choices: Mapping[str, Choices], chosen: dict[str, int], rest: float) -> None:
    """Upgrade, in place, the module that gains most per number, until nothing affordable gains."""
    while True:
        best, upgrade = 0.0, None
        for name, c in choices.items():
            now = chosen[name]
            extra, gain = c.numbers - c.numbers[now], c.losses[now] - c.losses
            affordable = (extra > 0) & (extra <= rest)
            rates = np.where(affordable, gain / np.where(affordable, extra, 1.0), 0.0)
            index = int(np.argmax(rates))
            if rates[index] > best:
                best, upgrade = rates[index], (name, index, extra[index])
        if upgrade is None:
            return
        name, index, extra = upgrade
        chosen[name] = index
        rest -= extra


ALLOCATIONS: dict[str, Callable[[Budget], Plan]] = {
    "uniform": uniform,
    "type": by_type,
    "owl": owl,
    "iprs": iprs,
    "kl": by_loss,
}
PROFILED = ("owl", "iprs", "kl")  # those that read what the profile measures
