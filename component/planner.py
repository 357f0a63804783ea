"""From the model and a recipe to ranks and a solver: what is decided between loading the model and its first layer."""

import logging
from argparse import Namespace
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from component.allocation import ALLOCATIONS, PROFILED, attention_range, mlp_density, uniform
from component.budget import RANK_FLOOR, Budget, Module, Plan
from component.cost import LOW_RANK, PIVOTED, StorageFormat
from component.job import Job
from component.plan import read_plan
from component.profile import Profile, Profiling, make_profile
from component.sensitivity import output_weighting
from component.solvers import Solver, make_solver
from component.streaming import Flows, compress_layers
from component.tuning import ATTENTION_STEP, Recipe, searches_attention
from utils import checkpoint as files
from utils import report
from utils.errors import UsageError
from utils.layers import DecoderLayer, uncalled_linears

log = logging.getLogger("pifa")

DRAFT_WINDOWS = 8
MOMENT_TOKENS = 65536  # a profile of more is thinned: neighbours say much the same, and it has to stay the cheaper pass


@dataclass(frozen=True)
class Draft:
    """A first compressed model, in memory: its decoder layers, on the CPU, and all that decides what they are."""

    layers: list[nn.Module]
    identity: dict[str, Any]
    suffix: str  # of its profile's folder, where the user names that of the first


@dataclass(frozen=True)
class Planner:
    """What every recipe has in common. profile: None where neither allocation nor weighting asks for one."""

    options: Namespace
    modules: list[Module]
    device: torch.device
    profile: Profile | None = None

    @property
    def storage(self) -> StorageFormat:
        return PIVOTED if self.options.use_pifa else LOW_RANK

    def plan(self, recipe: Recipe) -> Plan:
        """By the named allocation, or from the user's file, whose ranks are taken as they are."""
        options, profile = self.options, self.profile
        if options.allocation not in ALLOCATIONS:
            return read_plan(Path(options.allocation), self.modules)
        budget = Budget(
            self.modules,
            options.density,
            self.storage,
            recipe.attention_density,
            curves=profile.curves(recipe.output_shrinkage) if profile else {},
            outliers=profile.outliers if profile else (),
            influence=profile.influence if profile else (),
            rank_multiple=options.rank_multiple,
            rank_floor=recipe.rank_floor,
        )
        return ALLOCATIONS[options.allocation](budget)

    def solver(self, recipe: Recipe) -> Solver:
        options, profile = self.options, self.profile
        weighting = token_weights = None
        if profile and recipe.output_shrinkage is not None:
            weighting = partial(_weighting, profile, recipe.output_shrinkage, self.device)
        if profile and recipe.token_power:
            token_weights = partial(_token_weights, profile, recipe.token_power, options.reconstruct_nsamples)
        return make_solver(
            options.prune,
            options.reconstruct_step,
            recipe.old_output_factor,
            recipe.drift_factor,
            options.ridge,
            weighting,
            token_weights,
        )


def check_budget(options: Namespace, modules: list[Module]) -> None:
    """Refuse what no ranks fit before the profile is made. Raises: UsageError."""
    if options.allocation in ALLOCATIONS:
        storage = PIVOTED if options.use_pifa else LOW_RANK
        uniform(Budget(modules, options.density, storage))
    if options.attn_ratio is not None:
        mlp_density(modules, options.density, 1 - options.attn_ratio)


def recipe_of(options: Namespace) -> Recipe:
    """What the flags ask for."""
    attention = None if options.attn_ratio is None else 1 - options.attn_ratio
    factors = options.old_output_factor, options.drift_factor, options.output_shrinkage, options.token_power
    return Recipe(*factors, RANK_FLOOR, attention)


def attention_densities(options: Namespace, modules: list[Module]) -> list[float]:
    """Those to choose from where the flags leave it open: the whole one, and 0.1 less where the MLP can balance it."""
    if not searches_attention(options):
        return []
    least, _ = attention_range(modules, options.density)
    lower = round(options.density - ATTENTION_STEP, 12)
    return [options.density, lower] if lower > least else [options.density]


def profile_for(
    job: Job,
    model: PreTrainedModel,
    described: list[DecoderLayer],
    recipes: list[Recipe],
    device: torch.device,
    batch: int,
    draft: Draft | None = None,
) -> Profile | None:
    """The profile that these recipes need, if they do: made here, or taken from an earlier run.

    draft: of the compressed model, whose gradients then count in place of the original's.
    """
    options = job.options
    shrinkages = tuple(dict.fromkeys(recipe.output_shrinkage for recipe in recipes))
    weighs_tokens = any(recipe.token_power for recipe in recipes)
    if options.allocation not in PROFILED and shrinkages == (None,) and not weighs_tokens:
        return None
    rows = job.windows[: options.profile_nsamples]
    thinning = -(-rows.numel() // MOMENT_TOKENS)
    settings = {
        "model": options.model,
        "weights": job.identity["weights"],
        "windows_sha256": files.hash_of(rows.tolist()),
        "seed": options.seed,
        "output_shrinkages": shrinkages,
        "thinning": thinning,
        "draft": draft and draft.identity,
    }
    hashed = files.hash_of(settings)
    given = options.profiling_mat_path and options.profiling_mat_path + (draft.suffix if draft else "")
    folder = Path(given or Path(options.save_path) / f"profile_{job.source.name}_{hashed[:8]}")
    layers = draft.layers if draft else None
    return make_profile(
        folder, hashed, model, described, Profiling(rows, device, options.seed, shrinkages, batch, layers, thinning)
    )


def draft_of(
    planner: Planner,
    recipe: Recipe,
    job: Job,
    model: PreTrainedModel,
    described: list[DecoderLayer],
    device: torch.device,
    batch: int,
    number: int,
) -> Draft:
    """The model as pass `number` - 1 would make it, from a few windows: enough to see what matters behind it.

    Gradients through the compressed model say better than those through the original where its errors count. Drafts
    from 8 windows served as well as drafts from all 64.
    """
    if planner.profile is None:
        raise UsageError("--passes 2 is for what reads a profile, such as --allocation kl")
    windows = job.windows[:DRAFT_WINDOWS]
    plan, solver = planner.plan(recipe), planner.solver(recipe)
    flows = Flows(windows, len(windows), len(windows), batch)
    layers = [layer.cpu() for _, layer in compress_layers(model, described, plan, solver, flows, device, job.dtype)]
    identity = {
        "profile": planner.profile.identity,
        "plan": plan,
        "recipe": asdict(recipe),
        "prune": planner.options.prune,
        "step": planner.options.reconstruct_step,
        "ridge": planner.options.ridge,
    }
    return Draft(layers, identity, f"-pass{number}")


def _weighting(profile: Profile, shrinkage: float, device: torch.device, name: str) -> Tensor:
    return output_weighting(profile.output_gram(name, device), shrinkage, name)


def _token_weights(profile: Profile, power: float, count: int, name: str) -> Tensor:
    """(count, length): scores to the power, with mean 1; windows that the profile has not seen weigh 1."""
    scores = profile.token_scores(name)[:count] ** power
    return torch.cat([scores / scores.mean(), scores.new_ones(count - len(scores), scores.shape[1])])


def modules_of(model: PreTrainedModel, described: list[DecoderLayer]) -> list[Module]:
    modules = []
    for index, layer in enumerate(described):
        for name in layer.linears():
            linear = model.get_submodule(f"{layer.name}.{name}")
            assert isinstance(linear, nn.Linear)
            shape = linear.out_features, linear.in_features
            modules.append(Module(f"{layer.name}.{name}", *shape, name in layer.attention, index))
        for name in uncalled_linears(model.get_submodule(layer.name), layer):
            log.warning("%s.%s is not called in a forward pass and stays as it is", layer.name, name)
    return modules


def announce(options, model: PreTrainedModel, modules: list[Module], flows: Flows, device: torch.device) -> None:
    """What is about to be done, and whether it fits."""
    log.info(
        "density %g (ratio removed %g), %d linears, %d windows of %d tokens on %s",
        options.density, 1 - options.density, len(modules), *flows.windows.shape, device,
    )  # fmt: skip
    embeddings: Any = model.get_input_embeddings()
    width = embeddings.weight.shape[1]
    size = next(model.parameters()).element_size()
    states = 2 * flows.windows.numel() * width * size
    moments = 3 * max(module.d_in for module in modules) ** 2 * 8
    log.info("hidden states %.2f GiB in host memory, moments %.2f GiB", states / report.GIB, moments / report.GIB)
    if states > report.available_memory():
        log.warning("that is more host memory than is free: use fewer windows (--reconstruct_nsamples)")
    tokens = flows.reconstruction * flows.windows.shape[1]
    rows = max(module.d_in for module in modules)
    if tokens < rows:
        log.warning(
            "%d calibration tokens for Gram matrices of %d rows: at least %d windows would be needed",
            tokens, rows, -(-rows // flows.windows.shape[1]),
        )  # fmt: skip
