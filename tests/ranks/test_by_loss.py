"""component/ranks/by_loss.py: blocks that may have fewer channels in place of ranks."""

import pytest

from component.ranks.budget import Budget, Module
from component.ranks.by_loss import Block, by_loss, by_loss_and_form
from component.ranks.cost import PIVOTED
from component.ranks.sizes import Channels

MODULES = [Module(name, 40, 40, attention=False) for name in ("a", "b", "c", "q")]
BLOCK = ("a", "b", "c")


def falling(start: float, count: int) -> list[float]:
    return [start * (1 - i / count) ** 2 for i in range(count + 1)]


@pytest.mark.parametrize(("start", "narrow"), [(1e-9, True), (1e9, False)])
def test_the_form_that_loses_less_is_taken_within_the_budget(start, narrow):
    budget = Budget(MODULES, 0.7, PIVOTED, curves={m.name: falling(1.0, 40) for m in MODULES})
    plan = by_loss_and_form(budget, [Block(BLOCK, falling(start, 40))])
    assert [isinstance(plan[name], Channels) for name in BLOCK] == [narrow] * 3
    assert list(plan) == [m.name for m in MODULES]
    if narrow:
        assert len({plan[name] for name in BLOCK}) == 1
        spent = 3 * 40 * plan["a"].left + PIVOTED.stored(plan["q"].number, 40, 40)
        assert 0.65 * 6400 < spent <= 0.7 * 6400
    else:
        assert plan == by_loss(budget)


def test_channels_come_in_multiples_too():
    budget = Budget(MODULES, 0.7, PIVOTED, curves={m.name: falling(1.0, 40) for m in MODULES}, rank_multiple=8)
    plan = by_loss_and_form(budget, [Block(BLOCK, falling(1e-9, 40))])
    assert isinstance(plan["a"], Channels) and plan["a"].left % 8 == 0


def test_a_price_can_have_one_block_narrow_and_another_not():
    modules = [Module(f"{block}.{name}", 40, 40, attention=False, layer=block) for block in (0, 1) for name in BLOCK]
    budget = Budget(modules, 0.6, PIVOTED, curves={m.name: falling(1.0, 40) for m in modules})
    blocks = [Block(tuple(f"{i}.{n}" for n in BLOCK), falling(loss, 40)) for i, loss in enumerate((0.5, 50.0))]
    plan = by_loss_and_form(budget, blocks)
    assert isinstance(plan["0.a"], Channels) and not isinstance(plan["1.a"], Channels)
