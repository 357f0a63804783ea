"""The planner of --prune auto: the plans of its parts and of their mixture, and who carries them out.

The mixture weighs factors against fewer channels block by block, by what the profile says that both lose. Which of
the three is written is chosen on held-out windows, so that it is the best of them there.
"""

from dataclasses import dataclass, replace
from typing import Any

from component.channels.mixing import Mixing
from component.compress.channel_planner import ChannelPlanner
from component.compress.factor_planner import FactorPlanner
from component.compress.recipe import Recipe
from component.compress.settings import Settings
from component.flow.solving import LayerSolver
from component.ranks.by_loss import Block, by_loss_and_form
from component.ranks.sizes import Channels, Plan
from component.solve.names import AUTO, EXACT, FACTORING, NARROWING
from component.solve.solver import Solver
from utils.errors import UsageError

MIXED = "mixed"
FORMS = (FACTORING[0], NARROWING, MIXED)  # those of the parts are the values of --prune that make them alone


@dataclass(frozen=True)
class AutoPlanner:
    """The parts as they are by themselves; a recipe's form says which of them, or the mixture."""

    factors: FactorPlanner
    channels: ChannelPlanner

    def kinds(self, start: Recipe) -> list[Recipe]:
        """The mixture only where some block is narrower in it."""
        recipes = [replace(start, form=form) for form in FORMS]
        mixes = any(isinstance(size, Channels) for size in self.plan(recipes[-1]).values())
        return recipes if mixes else recipes[:-1]

    def plan(self, recipe: Recipe) -> Plan:
        if recipe.form != MIXED:
            return self._part(recipe).plan(recipe)
        assert self.factors.profile is not None
        curves = self.factors.profile.narrow_curves(recipe.output_shrinkage)
        blocks = []
        for layer, part in self.channels.parts_by_layer().items():
            for names in (part.attention, part.mlp):
                full = tuple(f"{layer}.{name}" for name in names)
                blocks.append(Block(full, curves[full[-1]]))
        return by_loss_and_form(self.factors.budget(recipe), blocks)

    def solver(self, recipe: Recipe) -> Solver:
        return self._part(recipe).solver(recipe)

    def layer_solver(self, recipe: Recipe) -> LayerSolver | None:
        if recipe.form != MIXED:
            return self._part(recipe).layer_solver(recipe)
        weighting = self.factors.weighting(recipe)
        return Mixing(self.channels.parts_by_layer(), damping=self.factors.settings.ridge, weighting=weighting)

    def entries(self, plan: Plan) -> dict[str, dict[str, Any]]:
        return self.channels.entries(plan)

    def _part(self, recipe: Recipe) -> FactorPlanner | ChannelPlanner:
        return self.channels if recipe.form == NARROWING else self.factors


def check_auto(settings: Settings, processes: int) -> None:
    """Raises: UsageError for flags that can't be met with --prune auto."""
    if settings.allocation != "kl":
        raise UsageError(f"--prune auto compares losses: it takes --allocation kl, not {settings.allocation}")
    if settings.reconstruct_step is not EXACT:
        raise UsageError(f"--prune {AUTO} fits exactly what it makes: leave out --reconstruct_step")
    if processes > 1:
        raise UsageError(f"--prune {AUTO} makes {NARROWING} too, which solves a layer as a whole: no torchrun")
