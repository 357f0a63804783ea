"""Allocations that look for the plan of least loss: what every rank of every module loses is in `Budget.curves`."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from component.ranks.budget import Budget, Module, rank_of, rounded_down
from component.ranks.sizes import DENSE, Channels, Plan, Rank, Size
from utils.errors import UsageError

PRICE_BISECTIONS = 100
MOST_PRICE = 1e30
LOSS_POWER = 0.85  # chosen on held-out text among 0.7, 0.85, 1 and 1.2
ASVD_RATIOS = tuple(tenths / 10 for tenths in range(1, 10))  # and dense


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

    What is added up is the loss to the power 0.85: an estimate to second order says too much where it is large.
    """
    choices = {module.name: _ranks_from_floor(module, budget) for module in budget.modules}
    price = _price(budget, lambda price: _spent(choices, _at_price(choices, price)))
    return _plan(_settled(budget, choices, _at_price(choices, price)))


class Block(NamedTuple):
    """Linears that can have fewer channels between them. curve: the expected loss at every number of channels."""

    names: tuple[str, ...]
    curve: Sequence[float]


def by_loss_and_form(budget: Budget, blocks: Sequence[Block]) -> Plan:
    """`by_loss` where each block either has ranks or, if that loses less at the price, fewer channels.

    A linear of a block that got narrower has Channels in the plan.
    """
    choices = {module.name: _ranks_from_floor(module, budget) for module in budget.modules}
    numbers = {module.name: module.numbers for module in budget.modules}
    narrow = {_key(block): _channels_from_floor(block, numbers, budget) for block in blocks}

    def chosen(price: float) -> dict[str, Choices]:
        """Of every block the form that is better at this price, as what is then to choose from."""
        found = dict(choices)
        for block in blocks:
            ranks, channels = {name: choices[name] for name in block.names}, {_key(block): narrow[_key(block)]}
            if _least(channels, price) < _least(ranks, price):
                found = {name: c for name, c in found.items() if name not in ranks} | channels
        return found

    def spent(price: float) -> float:
        found = chosen(price)
        return _spent(found, _at_price(found, price))

    price = _price(budget, spent)
    found = chosen(price)
    numbers_left = _settled(budget, found, _at_price(found, price))
    sizes: dict[str, Size] = {}
    for block in blocks:
        if _key(block) in numbers_left:
            left = numbers_left.pop(_key(block))
            sizes |= dict.fromkeys(block.names, DENSE if left is None else Channels(left))
    sizes |= _plan(numbers_left)
    return {module.name: sizes[module.name] for module in budget.modules}


def _key(block: Block) -> str:
    return "+".join(block.names)


def _price(budget: Budget, spent: Callable[[float], float]) -> float:
    """The least price, to rounding, at which what is spent fits the budget; spent(price) does not rise."""
    low, high = 0.0, 1.0
    while spent(high) > budget.numbers:
        low, high = high, high * 16
        if high > MOST_PRICE:
            raise UsageError(f"no ranks fit density {budget.density:g}: ask for more")
    for _ in range(PRICE_BISECTIONS):
        price = (low + high) / 2
        low, high = (price, high) if spent(price) > budget.numbers else (low, price)
    return high


def asvd(budget: Budget) -> Plan:
    """One threshold for every module's loss (ASVD's search, arXiv 2312.05821, on the profile's losses).

    A module keeps the smallest of 0.1, 0.2 .. 0.9 of its numbers whose loss is no more than the threshold, or stays
    dense. The threshold is the smallest that fits the budget; what is left over buys the best affordable upgrades.

    Raises: UsageError where the smallest share of every module is more than the density asked.
    """
    choices = {module.name: _ranks_of_ratios(module, budget) for module in budget.modules}
    # between two losses that occur nothing changes
    thresholds = np.unique(np.concatenate([c.losses for c in choices.values()]))
    if _spent(choices, _below(choices, thresholds[-1])) > budget.numbers:
        raise UsageError(f"asvd keeps {ASVD_RATIOS[0]:g} of every linear at least: no ranks fit {budget.density:g}")
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        fits = _spent(choices, _below(choices, thresholds[middle])) <= budget.numbers
        low, high = (low, middle) if fits else (middle + 1, high)
    return _plan(_settled(budget, choices, _below(choices, thresholds[high])))


def _ranks_from_floor(module: Module, budget: Budget) -> Choices:
    """Every rank from the floor on; with a rank multiple, the multiples from the floor, rounded down, on.

    The uniform rank, rounded down, is one of them, so that the budget always allows a plan.
    """
    full, multiple = min(module.d_out, module.d_in), budget.rank_multiple
    uniform = rank_of(budget, module, budget.density)
    least = full - 1 if uniform is None else int(budget.rank_floor * uniform)
    ranks = set(range(max(multiple, least - least % multiple), full, multiple))
    if uniform is not None and uniform < multiple:
        ranks.add(uniform)
    choices = _choices(module, ranks, budget)
    return choices._replace(losses=choices.losses**LOSS_POWER)


def _channels_from_floor(block: Block, numbers: Mapping[str, int], budget: Budget) -> Choices:
    """Every number of channels from the same floor on, or of them the multiples asked for, and all of them."""
    full, whole = len(block.curve) - 1, sum(numbers[name] for name in block.names)
    least = max(1, int(budget.rank_floor * budget.density * full))
    kept = np.array([*(n for n in range(least, full) if n % budget.rank_multiple == 0), full])
    losses = np.asarray(block.curve, dtype=float)[kept] ** LOSS_POWER
    return Choices(kept, losses, kept * float(whole // full))


def _ranks_of_ratios(module: Module, budget: Budget) -> Choices:
    paid = [budget.storage.rank_for(ratio * module.numbers, module.d_out, module.d_in) for ratio in ASVD_RATIOS]
    return _choices(module, {rounded_down(rank, budget.rank_multiple) for rank in paid if rank}, budget)


def _choices(module: Module, ranks: set[int], budget: Budget) -> Choices:
    """These ranks, of which those that cost as much as dense are left out, and dense."""
    kept = [rank for rank in sorted(ranks) if budget.stored(module, rank) < module.numbers]
    curve = np.asarray(budget.curves[module.name], dtype=float)
    return Choices(
        np.array([*kept, min(module.d_out, module.d_in)]),
        np.append(curve[kept], 0.0),
        np.array([*(budget.stored(module, rank) for rank in kept), module.numbers], dtype=float),
    )


def _at_price(choices: Mapping[str, Choices], price: float) -> dict[str, int]:
    # losses per token are small and numbers are millions: the price is per million
    return {name: int(np.argmin(c.losses + price * 1e-6 * c.numbers)) for name, c in choices.items()}


def _least(choices: Mapping[str, Choices], price: float) -> float:
    """What these lose and cost, each at its best for this price."""
    return sum((c.losses + price * 1e-6 * c.numbers).min() for c in choices.values())


def _below(choices: Mapping[str, Choices], threshold: float) -> dict[str, int]:
    """The smallest choice of every module that loses no more; dense loses nothing."""
    return {name: int(np.argmax(c.losses <= threshold)) for name, c in choices.items()}


def _spent(choices: Mapping[str, Choices], chosen: Mapping[str, int]) -> float:
    return sum(c.numbers[chosen[name]] for name, c in choices.items())


def _plan(ranks: Mapping[str, int | None]) -> Plan:
    return {name: Rank.or_dense(rank) for name, rank in ranks.items()}


def _settled(budget: Budget, choices: Mapping[str, Choices], chosen: dict[str, int]) -> dict[str, int | None]:
    """The chosen ranks or channels, None for dense, after what they leave of the budget is spent."""
    _spend_rest(choices, chosen, budget.numbers - _spent(choices, chosen))
    last = {name: len(c.ranks) - 1 for name, c in choices.items()}
    return {n: None if chosen[n] == last[n] else int(c.ranks[chosen[n]]) for n, c in choices.items()}


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
