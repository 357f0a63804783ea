"""What --mode m needs to know of --prune flatllm: how wide everything becomes, and in which form it is stored."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from component.channels.influence import block_influence, read_influence
from component.channels.narrowing import Narrowing, narrow_entries, narrow_plan
from component.channels.parts import Parts, parts_of
from component.compress.recipe import Recipe
from component.flow.means import Means
from component.ranks.budget import Module, Plan
from component.solve.names import NARROWING
from component.solve.solvers import Solver, make_solver
from utils.errors import UsageError
from utils.layers import DecoderLayer

ALLOCATIONS = ("iprs", "uniform")


@dataclass(frozen=True)
class NarrowPlanner:
    """influence: by layer, all the same where every layer keeps the same share."""

    options: Namespace
    modules: list[Module]
    described: list[DecoderLayer]
    parts: list[Parts]
    influence: list[float]

    def kinds(self, _start: Recipe) -> list[Recipe]:
        return []

    def plan(self, _recipe: Recipe) -> Plan:
        return narrow_plan(
            self.modules, self.described, self.parts, density=self.options.density, influence=self.influence
        )

    def solver(self, recipe: Recipe) -> Solver:
        return make_solver(NARROWING, self.options.reconstruct_step, mix_ratio=recipe.old_output_factor)

    def narrowing(self, recipe: Recipe) -> Narrowing:
        return Narrowing(self.parts_by_layer(), mix_ratio=recipe.old_output_factor, damping=self.options.ridge)

    def entries(self, plan: Plan) -> dict[str, dict[str, Any]]:
        return narrow_entries(self.modules, self.described, self.parts, plan=plan)

    def parts_by_layer(self) -> dict[str, Parts]:
        return {layer.name: part for layer, part in zip(self.described, self.parts, strict=True)}


def check_narrow(options: Namespace, processes: int) -> None:
    """Raises: UsageError for flags that mean nothing with --prune flatllm."""
    if options.allocation not in ALLOCATIONS:
        raise UsageError(f"--prune flatllm takes --allocation {' or '.join(ALLOCATIONS)}, not {options.allocation}")
    if options.reconstruct_step != 0:
        raise UsageError("--prune flatllm makes up for what it leaves out by itself: leave out --reconstruct_step")
    if options.attn_ratio is not None or options.passes > 1:
        raise UsageError("--attn_ratio and --passes 2 are not for --prune flatllm")
    if processes > 1:
        raise UsageError("--prune flatllm solves a layer as a whole: start it without torchrun")


def narrow_planner(
    options: Namespace,
    model: PreTrainedModel,
    described: list[DecoderLayer],
    modules: list[Module],
    windows: Tensor,
    means: Means,
) -> NarrowPlanner:
    """With iprs the influence comes from --bi_score, or is measured on the windows, (count, length) int64.

    Raises: UsageError where the layers are of another kind, or the density leaves one nothing.
    """
    parts = [parts_of(model.get_submodule(layer.name), layer) for layer in described]
    planner = NarrowPlanner(options, modules, described, parts, [1.0] * len(described))
    narrow_plan(
        modules, described, parts, density=options.density, influence=planner.influence
    )  # refuses, before the work
    saved = getattr(options, "bi_score", None)
    if options.allocation == "uniform":
        return planner
    if saved:
        influence = read_influence(Path(saved), len(described))
    else:
        influence = block_influence(
            model, described, windows, device=means.device, source=means.source, shelf=means.shelf
        )
    return NarrowPlanner(options, modules, described, parts, influence)
