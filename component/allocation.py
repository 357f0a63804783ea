"""How many ranks each module gets: numbers in, numbers out.

An allocation is a function from a `Budget` to a plan; it never sees a model. To add one, write the function and
name it in ALLOCATIONS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from component.cost import StorageFormat
from utils.errors import UsageError

Plan = dict[str, int | None]  # module name -> rank, None where the module stays dense


@dataclass(frozen=True)
class Module:
    """A linear of a decoder layer; `attention` tells its type for allocations that treat the two apart."""

    name: str
    d_out: int
    d_in: int
    attention: bool

    @property
    def numbers(self) -> int:
        return self.d_out * self.d_in


@dataclass(frozen=True)
class Budget:
    """What an allocation decides on: modules in model order, the density asked, the format that is paid for.

    attention_density is None unless the user gave --attn_ratio.
    """

    modules: Sequence[Module]
    density: float
    storage: StorageFormat
    attention_density: float | None = None


def uniform(budget: Budget) -> Plan:
    """The same density for every module."""
    return _plan(budget, lambda module: budget.density)


def by_type(budget: Budget) -> Plan:
    """One density for attention, and for the MLP the one that keeps the whole at the density asked (PIFA, B.2)."""
    attention = budget.density if budget.attention_density is None else budget.attention_density
    mlp = mlp_density(budget.modules, budget.density, attention)
    return _plan(budget, lambda module: attention if module.attention else mlp)


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


ALLOCATIONS: dict[str, Callable[[Budget], Plan]] = {"uniform": uniform, "type": by_type}
