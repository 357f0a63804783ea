"""A model in, compressed layers out: what --mode m and the Python API have in common. Nothing is written here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from component.checkpoint.entries import Entries
from component.compress.auto_planner import AutoPlanner, check_auto
from component.compress.channel_planner import channel_planner, check_narrow
from component.compress.factor_planner import factor_planner
from component.compress.judging import held_out_perplexity
from component.compress.planner import Planner
from component.compress.recipe import Recipe, candidates, choose_recipe, tunable
from component.compress.settings import Settings
from component.compress.task import Task
from component.flow.streaming import Compression, Refinement, compress_layers
from component.ranks.sizes import Plan
from component.solve.names import AUTO, NARROWING
from utils.errors import UsageError


@dataclass(frozen=True)
class Design:
    """What a recipe comes to: the plan, and the `layers` of the quantization config."""

    recipe: Recipe
    plan: Plan
    entries: Entries


@dataclass(frozen=True)
class Pipeline:
    """A task and the planner that is ready for it; `planned` makes one."""

    task: Task
    planner: Planner

    def design(self, recipe: Recipe) -> Design:
        """Raises: UsageError where the density pays for no such plan."""
        plan = self.planner.plan(recipe)
        return Design(recipe, plan, self.planner.entries(plan))

    def layers(
        self, design: Design, finished: Callable[[int, nn.Module], bool] = lambda index, layer: False
    ) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, layer) for every decoder layer, as designed. The model stays as it was.

        finished: may fill a layer from an earlier run, see compress_layers.
        """
        task, settings = self.task, self.task.settings
        refinement = None
        if settings.refine_steps:
            # towards the same mixture of flows as the solvers aim at
            ratio = settings.drift_factor
            refinement = Refinement(steps=settings.refine_steps, drift_ratio=ratio, seed=settings.seed)
        compression = Compression(
            design.plan,
            self.planner.solver(design.recipe),
            dtype=task.dtype,
            layer_solver=self.planner.layer_solver(design.recipe),
            refinement=refinement,
        )
        return compress_layers(
            task.model, task.described, compression, flows=task.flows, means=task.means, finished=finished
        )

    def judge(self, recipe: Recipe) -> float:
        """Perplexity on the held-out windows of the model that the recipe makes."""
        means = self.task.means
        layers = self.layers(self.design(recipe))
        found = held_out_perplexity(
            self.task.model, layers, self.task.text.held_out, device=means.device, batch=means.batch
        )
        return means.team.agreed(found)

    def choose(self) -> tuple[Recipe, list[dict[str, Any]]]:
        """The recipe of least held-out perplexity, and all that were judged: see choose_recipe."""
        start, names = self.task.settings.recipe(), constants_of(self.task.settings)
        kinds = self.planner.kinds(start)
        return choose_recipe(start, kinds, names=names, count=self.task.settings.tune, judge=self.judge)


def planned(task: Task) -> Pipeline:
    """Measure what the planner of --prune wants to know. Raises: UsageError for a density that can't be met."""
    settings = task.settings
    start = settings.recipe()
    recipes = candidates(start, constants_of(settings), max(settings.tune, 1))
    if settings.prune == NARROWING:
        return Pipeline(task, channel_planner(task))
    if settings.prune == AUTO:
        channels = channel_planner(task)
        return Pipeline(task, AutoPlanner(factor_planner(task, start, recipes), channels))
    return Pipeline(task, factor_planner(task, start, recipes))


def constants_of(settings: Settings) -> list[str]:
    """Names of the constants that --tune may change."""
    return tunable(settings.reconstruct_step, settings.allocation)


def check_method(settings: Settings, processes: int) -> None:
    """Raises: UsageError for settings that the pruner, or several processes, can't meet."""
    if settings.prune == NARROWING:
        check_narrow(settings, processes)
    if settings.prune == AUTO:
        check_auto(settings, processes)
    if processes > 1 and settings.refine_steps:
        raise UsageError("--refine_steps tunes on all windows at once: start it without torchrun")
