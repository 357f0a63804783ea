"""The planner of low-rank factors: ranks by an allocation, errors weighed by what the profile says they cost."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from component.checkpoint.entries import layer_entries
from component.compress.draft import draft_of
from component.compress.profile import Profile
from component.compress.profile_kept import profile_for
from component.compress.recipe import ATTENTION_STEP, Recipe
from component.compress.settings import Settings
from component.compress.task import Task
from component.ranks.allocation import ALLOCATIONS, attention_range
from component.ranks.budget import Budget, Module
from component.ranks.plan import read_plan
from component.ranks.sizes import Plan
from component.solve.sensitivity import output_weighting
from component.solve.solver import Solver
from component.solve.solvers import make_solver
from utils.errors import UsageError


@dataclass(frozen=True)
class FactorPlanner:
    """What every recipe has in common. profile: None where neither allocation nor weighting asks for one."""

    settings: Settings
    modules: list[Module]
    _: KW_ONLY
    device: torch.device
    profile: Profile | None = None

    def kinds(self, start: Recipe) -> list[Recipe]:
        densities = attention_densities(self.settings, self.modules)
        return [replace(start, attention_density=density) for density in densities]

    def layer_solver(self, _recipe: Recipe) -> None:
        return None

    def entries(self, plan: Plan) -> dict[str, dict[str, Any]]:
        return layer_entries(self.modules, plan)

    def plan(self, recipe: Recipe) -> Plan:
        """By the named allocation, or from the user's file, whose ranks are taken as they are."""
        allocation = self.settings.allocation
        if allocation not in ALLOCATIONS:
            return read_plan(Path(allocation), self.modules)
        return ALLOCATIONS[allocation].share_out(self.budget(recipe))

    def budget(self, recipe: Recipe) -> Budget:
        settings, profile = self.settings, self.profile
        return Budget(
            self.modules,
            settings.density,
            settings.storage,
            attention_density=recipe.attention_density,
            curves=profile.curves(recipe.output_shrinkage) if profile else {},
            outliers=profile.outliers if profile else (),
            influence=profile.influence if profile else (),
            rank_multiple=settings.rank_multiple,
            rank_floor=recipe.rank_floor,
        )

    def weighting(self, recipe: Recipe) -> Callable[[str], Tensor] | None:
        """Module name -> L_g; None where output errors all count alike."""
        if self.profile is None or recipe.output_shrinkage is None:
            return None
        return partial(_weighting, self.profile, recipe.output_shrinkage, device=self.device)

    def solver(self, recipe: Recipe) -> Solver:
        settings, profile = self.settings, self.profile
        token_weights = None
        if profile and recipe.token_power:
            count = settings.reconstruct_nsamples
            token_weights = partial(_token_weights, profile, recipe.token_power, count=count)
        return make_solver(
            settings.prune,
            settings.reconstruct_step,
            mix_ratio=recipe.old_output_factor,
            drift_ratio=recipe.drift_factor,
            ridge=settings.ridge,
            weighting=self.weighting(recipe),
            token_weights=token_weights,
        )


def attention_densities(settings: Settings, modules: list[Module]) -> list[float]:
    """Those to choose from where the flags leave it open: the whole one, and 0.1 less where the MLP can balance it."""
    if not settings.searches_attention:
        return []
    least, _ = attention_range(modules, settings.density)
    lower = round(settings.density - ATTENTION_STEP, 12)
    return [settings.density, lower] if lower > least else [settings.density]


def factor_planner(task: Task, start: Recipe, recipes: list[Recipe]) -> FactorPlanner:
    """For any of the recipes, after as many passes as the settings say: those before the last compress by `start`."""
    profile = profile_for(task, recipes)
    planner = FactorPlanner(task.settings, task.modules, device=task.means.device, profile=profile)
    for number in range(2, task.settings.passes + 1):
        if planner.profile is None:
            raise UsageError("--passes 2 is for what reads a profile, such as --allocation kl")
        draft = draft_of(task, start, planner=planner, profile=planner.profile, number=number)
        planner = replace(planner, profile=profile_for(task, recipes, draft))
    return planner


def _weighting(profile: Profile, shrinkage: float, name: str, *, device: torch.device) -> Tensor:
    return output_weighting(profile.output_gram(name, device), shrinkage, name)


def _token_weights(profile: Profile, power: float, name: str, *, count: int) -> Tensor:
    """(count, length): scores to the power, with mean 1; windows that the profile has not seen weigh 1."""
    scores = profile.token_scores(name)[:count] ** power
    return torch.cat([scores / scores.mean(), scores.new_ones(count - len(scores), scores.shape[1])])
