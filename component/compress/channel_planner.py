"""The planner of --prune flatllm: how wide everything becomes, and in which form it is stored."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from component.channels.influence import block_influence, read_influence
from component.channels.narrowing import Narrowing, narrow_entries, narrow_plan
from component.channels.parts import Parts, parts_of
from component.compress.recipe import Recipe
from component.compress.settings import Settings
from component.compress.task import Task
from component.ranks.budget import Module
from component.ranks.sizes import Plan
from component.solve.names import NARROWING
from component.solve.solver import Solver
from component.solve.solvers import make_solver
from utils.errors import UsageError
from utils.layers import DecoderLayer

ALLOCATIONS = ("iprs", "uniform")


@dataclass(frozen=True, kw_only=True)
class ChannelPlanner:
    """influence: by layer, all the same where every layer keeps the same share."""

    settings: Settings
    modules: list[Module]
    described: list[DecoderLayer]
    parts: list[Parts]
    influence: list[float]

    def kinds(self, _start: Recipe) -> list[Recipe]:
        return []

    def plan(self, _recipe: Recipe) -> Plan:
        return narrow_plan(
            self.modules, self.described, self.parts, density=self.settings.density, influence=self.influence
        )

    def solver(self, recipe: Recipe) -> Solver:
        return make_solver(NARROWING, self.settings.reconstruct_step, mix_ratio=recipe.old_output_factor)

    def layer_solver(self, recipe: Recipe) -> Narrowing:
        return Narrowing(self.parts_by_layer(), mix_ratio=recipe.old_output_factor, damping=self.settings.ridge)

    def entries(self, plan: Plan) -> dict[str, dict[str, Any]]:
        return narrow_entries(self.modules, self.described, self.parts, plan=plan)

    def parts_by_layer(self) -> dict[str, Parts]:
        return {layer.name: part for layer, part in zip(self.described, self.parts, strict=True)}


def check_narrow(settings: Settings, processes: int) -> None:
    """Raises: UsageError for flags that mean nothing with --prune flatllm."""
    if settings.allocation not in ALLOCATIONS:
        raise UsageError(f"--prune flatllm takes --allocation {' or '.join(ALLOCATIONS)}, not {settings.allocation}")
    if settings.reconstruct_step != 0:
        raise UsageError("--prune flatllm makes up for what it leaves out by itself: leave out --reconstruct_step")
    if settings.attn_ratio is not None or settings.passes > 1:
        raise UsageError("--attn_ratio and --passes 2 are not for --prune flatllm")
    if processes > 1:
        raise UsageError("--prune flatllm solves a layer as a whole: start it without torchrun")


def channel_planner(task: Task) -> ChannelPlanner:
    """With iprs the influence comes from --bi_score, or is measured on the windows for reconstruction.

    Raises: UsageError where the layers are of another kind, or the density leaves one nothing.
    """
    settings, means = task.settings, task.means
    parts = [parts_of(task.model.get_submodule(layer.name), layer) for layer in task.described]
    alike = [1.0] * len(task.described)
    # refuses, before the work
    narrow_plan(task.modules, task.described, parts, density=settings.density, influence=alike)
    if settings.allocation == "uniform":
        influence = alike
    elif settings.bi_score:
        influence = read_influence(Path(settings.bi_score), len(task.described))
    else:
        windows = task.text.windows[: settings.reconstruct_nsamples]
        influence = block_influence(
            task.model, task.described, windows, device=means.device, source=means.source, shelf=means.shelf
        )
    return ChannelPlanner(
        settings=settings, modules=task.modules, described=task.described, parts=parts, influence=influence
    )
