"""A first compressed model, in memory, through which the profile of a second pass is taken."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from component.compress.planner import Planner
from component.compress.profile import Profile
from component.compress.recipe import Recipe, as_json
from component.compress.task import Task
from component.flow.means import Flows
from component.flow.streaming import Compression, compress_layers
from component.ranks.sizes import numbers_of

DRAFT_WINDOWS = 8


@dataclass(frozen=True)
class Draft:
    """layers: the decoder layers, on the CPU; identity: all that decides what they are.

    suffix: of its profile's folder, where the user names that of the first.
    """

    layers: list[nn.Module]
    identity: dict[str, Any]
    suffix: str


def draft_of(task: Task, recipe: Recipe, *, planner: Planner, profile: Profile, number: int) -> Draft:
    """The model as pass `number` - 1 would make it, from a few windows: enough to see what matters behind it.

    Gradients through the compressed model say better than those through the original where its errors count. Drafts
    from 8 windows served as well as drafts from all 64.
    """
    windows = task.text.windows[:DRAFT_WINDOWS]
    plan = planner.plan(recipe)
    compression = Compression(plan, planner.solver(recipe), dtype=task.dtype)
    flows = Flows(windows, whitening=len(windows), reconstruction=len(windows))
    driver = compress_layers(task.model, task.described, compression, flows=flows, means=task.means)
    layers = [layer.cpu() for _, layer in driver]
    identity = {
        "profile": profile.identity,
        "plan": numbers_of(plan),
        "recipe": as_json(recipe),
        "prune": task.settings.prune,
        "step": task.settings.reconstruct_step,
        "ridge": task.settings.ridge,
    }
    return Draft(layers, identity, f"-pass{number}")
