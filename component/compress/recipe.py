"""Hyperparameters are chosen on held-out windows of the calibration text, never on the text that is judged.

`choose_recipe` looks at recipes through a function that gives a recipe's held-out perplexity (judging.py).
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from component.solve.names import EXACT

log = logging.getLogger("pifa")

ATTENTION_STEP = 0.1  # the MPIFA of the paper keeps less of attention by this where that is better (PIFA, B.2)
# what --tune tries of each constant; where the flags ask for one of the values, it is the start and not tried twice
VALUES: dict[str, tuple[float | None, ...]] = {
    "old_output_factor": (0.5, 0.125, 0.25),
    "drift_factor": (0.75, 0.25, 0.5),
    "output_shrinkage": (0.3, 0.03, 0.1),
    "token_power": (0.25, 0.75, 0.5),
    "rank_floor": (0.15, 0.5, 0.3),
}


@dataclass(frozen=True)
class Recipe:
    """The constants that can be chosen: those of the solver, then those of the allocation.

    form: with --prune auto, what is made; see auto_planner.py.
    """

    old_output_factor: float
    drift_factor: float
    output_shrinkage: float | None
    token_power: float
    rank_floor: float
    attention_density: float | None = None
    form: str | None = None


def tunable(reconstruct_step: int | None, allocation: str) -> list[str]:
    """The constants that make a difference with these flags."""
    without = set()
    if reconstruct_step == 0:
        without |= {"old_output_factor", "drift_factor", "token_power"}
    if reconstruct_step is not EXACT:
        without.add("output_shrinkage")
    if allocation != "kl":
        without.add("rank_floor")
    return [name for name in VALUES if name not in without]


def candidates(start: Recipe, names: Sequence[str], count: int) -> list[Recipe]:
    """At most `count` recipes: the start, then those with one of the named constants changed, then with two."""
    rows = zip(*(VALUES[name] for name in names), strict=True)  # the first values of all constants, then the second
    changes: list[dict[str, Any]] = [{name: value} for row in rows for name, value in zip(names, row, strict=True)]
    pairs = [one | other for one, other in itertools.combinations(changes, 2) if one.keys() != other.keys()]
    found = [replace(start, **change) for change in [{}, *changes, *pairs]]
    return list(dict.fromkeys(found))[:count]


def choose_recipe(
    start: Recipe, kinds: Sequence[Recipe], *, names: Sequence[str], count: int, judge: Callable[[Recipe], float]
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The recipe of least held-out perplexity, and all that were judged, in order, each with its `heldout_ppl`.

    kinds: what to choose from first in place of the start, if anything. Then `count` candidates around the best one,
    none where that is 0. Where there is one possibility it is taken unseen; of equals the earlier one is.
    """
    judged: dict[Recipe, float] = {}

    def best(recipes: list[Recipe]) -> Recipe:
        for recipe in recipes:
            if recipe not in judged:
                judged[recipe] = judge(recipe)
                log.info("held-out perplexity %.4f: %s", judged[recipe], ", ".join(_said(recipe)))
        return min(recipes, key=judged.__getitem__)

    start = best(list(kinds)) if len(kinds) > 1 else [*kinds, start][0]
    if count:
        start = best(candidates(start, names, count))
    return start, [{**as_json(recipe), "heldout_ppl": ppl} for recipe, ppl in judged.items()]


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe by name; its form only where it has one."""
    return {name: value for name, value in asdict(recipe).items() if (name, value) != ("form", None)}


def choice_in_record(recipe: Recipe, tuned: list[dict[str, Any]]) -> dict[str, Any]:
    """What a record says of the choice: the constants, --attn_ratio as it came out, and all that were judged."""
    constants = as_json(recipe)
    attention = constants.pop("attention_density")
    ratio = None if attention is None else round(1 - attention, 12)
    return {**constants, "attn_ratio": ratio, **({"tuned": tuned} if tuned else {})}


def _said(recipe: Recipe) -> list[str]:
    constants = asdict(recipe)
    form = constants.pop("form")
    return [form] * bool(form) + [f"{name} {value:g}" for name, value in constants.items() if value is not None]
