"""What an allocation decides on, and how densities become ranks. Numbers in, numbers out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from component.ranks.cost import StorageFormat
from component.ranks.sizes import Plan, Rank
from utils.errors import UsageError

RANK_FLOOR = 0.3  # of the uniform rank
ROUNDING = 1 + 1e-12  # a hair above the product: 0.3 * 10 is 3.0000000000000004 or 2.9999999999999996, by luck


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
    weights, and the influence of the block (how far it turns the hidden states). rank_multiple: ranks are multiples of
    it; rank_floor: the least share of its uniform rank that `kl` leaves a module.
    """

    modules: Sequence[Module]
    density: float
    storage: StorageFormat
    attention_density: float | None = None
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    outliers: Sequence[float] = ()
    influence: Sequence[float] = ()
    rank_multiple: int = 1
    rank_floor: float = RANK_FLOOR

    @property
    def numbers(self) -> float:
        """What all modules together may store."""
        return self.density * sum(module.numbers for module in self.modules) * ROUNDING

    def stored(self, module: Module, rank: int | None) -> int:
        return self.storage.stored(rank, module.d_out, module.d_in)


def rank_of(budget: Budget, module: Module, density: float) -> int | None:
    """The largest rank that the density pays for, or None for dense. Raises: UsageError where there is no such rank."""
    rank = budget.storage.rank_for(density * module.numbers * ROUNDING, module.d_out, module.d_in)
    if rank == 0:
        least = budget.stored(module, 1) / module.numbers
        raise UsageError(f"density {density:.4g} leaves {module.name} no rank at all; it needs at least {least:.4f}")
    return rank


def plan_of(budget: Budget, density_of: Callable[[Module], float]) -> Plan:
    """The ranks that these densities pay for. With a rank multiple they are rounded down, and what that frees goes on.

    Raises: UsageError naming the first module whose density pays for no rank.
    """
    ranks: dict[str, int | None] = {}
    for module in budget.modules:
        rank = rank_of(budget, module, density_of(module))
        ranks[module.name] = None if rank is None else rounded_down(rank, budget.rank_multiple)
    if budget.rank_multiple > 1:
        _hand_on(budget, ranks, {module.name: density_of(module) * module.numbers for module in budget.modules})
    return {name: Rank.or_dense(rank) for name, rank in ranks.items()}


def rounded_down(rank: int, multiple: int) -> int:
    """To a multiple; a rank below the first one stays as it is."""
    return rank if rank < multiple else rank - rank % multiple


def _hand_on(budget: Budget, ranks: dict[str, int | None], asked: Mapping[str, float]) -> None:
    """Spend what rounding freed, in place, a multiple at a time, first on the module that is furthest below its share.

    asked: the numbers of each module's share. A module whose next multiple would cost as much as dense becomes dense.
    """
    rest = budget.numbers - sum(budget.stored(module, ranks[module.name]) for module in budget.modules)
    while True:
        raised = {}  # module -> its next rank, where that can be paid
        for module in budget.modules:
            rank = ranks[module.name]
            if rank is not None:
                above = _next_rank(budget, module, rank)
                if budget.stored(module, above) - budget.stored(module, rank) <= rest:
                    raised[module] = above
        if not raised:
            return
        neediest = max(raised, key=lambda m: 1 - budget.stored(m, ranks[m.name]) / asked[m.name])
        rest -= budget.stored(neediest, raised[neediest]) - budget.stored(neediest, ranks[neediest.name])
        ranks[neediest.name] = raised[neediest]


def _next_rank(budget: Budget, module: Module, rank: int) -> int | None:
    above = (rank // budget.rank_multiple + 1) * budget.rank_multiple
    pays = above < min(module.d_out, module.d_in) and budget.stored(module, above) < module.numbers
    return above if pays else None
