"""From the model and a recipe to ranks and a solver: what is decided between loading the model and its first layer."""

import logging
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from component.channels.parts import parts_of
from component.checkpoint.entries import layer_entries
from component.compress.estimate import Estimate, Shapes, Work
from component.compress.job import Job
from component.compress.profile import Profile, Profiling, make_profile
from component.compress.recipe import ATTENTION_STEP, Recipe, as_json, searches_attention
from component.flow.means import Flows, Means
from component.flow.streaming import Compression, compress_layers
from component.ranks.allocation import ALLOCATIONS, PROFILED, attention_range, mlp_density, uniform
from component.ranks.budget import RANK_FLOOR, Budget, Module, Plan
from component.ranks.cost import LOW_RANK, PIVOTED, StorageFormat
from component.ranks.plan import read_plan
from component.solve.names import AUTO
from component.solve.sensitivity import output_weighting
from component.solve.solvers import Solver, make_solver
from utils import report
from utils.errors import UsageError
from utils.layers import DecoderLayer
from utils.whole_files import hash_of

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

    def kinds(self, start: Recipe) -> list[Recipe]:
        """What to choose from on held-out windows before any constants."""
        densities = attention_densities(self.options, self.modules)
        return [replace(start, attention_density=density) for density in densities]

    def narrowing(self, _recipe: Recipe) -> None:
        """Groups of linears are solved one by one."""

    def entries(self, plan: Plan) -> dict[str, dict[str, Any]]:
        return layer_entries(self.modules, plan)

    def plan(self, recipe: Recipe) -> Plan:
        """By the named allocation, or from the user's file, whose ranks are taken as they are."""
        if self.options.allocation not in ALLOCATIONS:
            return read_plan(Path(self.options.allocation), self.modules)
        return ALLOCATIONS[self.options.allocation](self.budget(recipe))

    def budget(self, recipe: Recipe) -> Budget:
        options, profile = self.options, self.profile
        return Budget(
            self.modules,
            options.density,
            storage_of(options),
            attention_density=recipe.attention_density,
            curves=profile.curves(recipe.output_shrinkage) if profile else {},
            outliers=profile.outliers if profile else (),
            influence=profile.influence if profile else (),
            rank_multiple=options.rank_multiple,
            rank_floor=recipe.rank_floor,
        )

    def weighting(self, recipe: Recipe) -> Callable[[str], Tensor] | None:
        """Module name -> L_g; None where output errors all count alike."""
        if self.profile is None or recipe.output_shrinkage is None:
            return None
        return partial(_weighting, self.profile, recipe.output_shrinkage, self.device)

    def solver(self, recipe: Recipe) -> Solver:
        options, profile = self.options, self.profile
        token_weights = None
        if profile and recipe.token_power:
            token_weights = partial(_token_weights, profile, recipe.token_power, options.reconstruct_nsamples)
        return make_solver(
            options.prune,
            options.reconstruct_step,
            mix_ratio=recipe.old_output_factor,
            drift_ratio=recipe.drift_factor,
            ridge=options.ridge,
            weighting=self.weighting(recipe),
            token_weights=token_weights,
        )


def storage_of(options: Namespace) -> StorageFormat:
    """The form that ranks are paid for in."""
    return PIVOTED if options.use_pifa else LOW_RANK


def check_budget(options: Namespace, modules: list[Module]) -> None:
    """Refuse what no ranks fit before the profile is made. Raises: UsageError."""
    if options.allocation in ALLOCATIONS:
        uniform(Budget(modules, options.density, storage_of(options)))
    if options.attn_ratio is not None:
        mlp_density(modules, options.density, 1 - options.attn_ratio)


def recipe_of(options: Namespace) -> Recipe:
    """What the flags ask for."""
    attention = None if options.attn_ratio is None else 1 - options.attn_ratio
    factors = options.old_output_factor, options.drift_factor, options.output_shrinkage, options.token_power
    return Recipe(*factors, RANK_FLOOR, attention)


def attention_densities(options: Namespace, modules: list[Module]) -> list[float]:
    """Those to choose from where the flags leave it open: the whole one, and 0.1 less where the MLP can balance it."""
    if not searches_attention(options.allocation, options.attn_ratio):
        return []
    least, _ = attention_range(modules, options.density)
    lower = round(options.density - ATTENTION_STEP, 12)
    return [options.density, lower] if lower > least else [options.density]


def profile_for(
    job: Job,
    model: PreTrainedModel,
    described: list[DecoderLayer],
    recipes: list[Recipe],
    means: Means,
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
        "windows_sha256": hash_of(rows.tolist()),
        "seed": options.seed,
        "output_shrinkages": shrinkages,
        "thinning": thinning,
        "draft": draft and draft.identity,
    }
    parts = None
    if options.prune == AUTO:
        settings["narrow"] = True
        parts = [parts_of(model.get_submodule(layer.name), layer) for layer in described]
    hashed = hash_of(settings)
    given = options.profiling_mat_path and options.profiling_mat_path + (draft.suffix if draft else "")
    folder = Path(given or Path(options.save_path) / f"profile_{job.source.name}_{hashed[:8]}")
    layers = draft.layers if draft else None
    profiling = Profiling(rows, means.device, options.seed, shrinkages, means.batch, layers, thinning, parts)
    profile = None
    for turn in range(means.team.size):  # the first process makes it, the others read it, one after the other
        if turn == means.team.rank:
            profile = make_profile(folder, hashed, model, described, profiling, means.source, means.shelf)
        means.team.wait()
    return profile


def planner_for(
    job: Job,
    model: PreTrainedModel,
    described: list[DecoderLayer],
    modules: list[Module],
    start: Recipe,
    recipes: list[Recipe],
    means: Means,
) -> Planner:
    """For any of the recipes, after as many passes as the flags ask for: those before the last compress by `start`."""
    planner = Planner(job.options, modules, means.device, profile_for(job, model, described, recipes, means))
    for number in range(2, job.options.passes + 1):
        draft = draft_of(planner, start, job, model, described, means, number)
        planner = replace(planner, profile=profile_for(job, model, described, recipes, means, draft))
    return planner


def draft_of(
    planner: Planner,
    recipe: Recipe,
    job: Job,
    model: PreTrainedModel,
    described: list[DecoderLayer],
    means: Means,
    number: int,
) -> Draft:
    """The model as pass `number` - 1 would make it, from a few windows: enough to see what matters behind it.

    Gradients through the compressed model say better than those through the original where its errors count. Drafts
    from 8 windows served as well as drafts from all 64.
    """
    if planner.profile is None:
        raise UsageError("--passes 2 is for what reads a profile, such as --allocation kl")
    windows = job.windows[:DRAFT_WINDOWS]
    plan = planner.plan(recipe)
    compression = Compression(plan, planner.solver(recipe), dtype=job.dtype)
    flows = Flows(windows, whitening=len(windows), reconstruction=len(windows))
    driver = compress_layers(model, described, compression, flows=flows, means=means)
    layers = [layer.cpu() for _, layer in driver]
    identity = {
        "profile": planner.profile.identity,
        "plan": plan,
        "recipe": as_json(recipe),
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


def announce(options: Namespace, modules: list[Module], flows: Flows, device: torch.device, found: Estimate) -> None:
    """What is about to be done, and what it takes."""
    log.info(
        "density %g (ratio removed %g), %d linears, %d windows of %d tokens on %s",
        options.density, 1 - options.density, len(modules), *flows.windows.shape, device,
    )  # fmt: skip
    parts = {"device memory": found.device, "host memory": found.host, "disk": found.disk}
    said = ", ".join(f"{part} {size / report.GIB:.2f} GiB" for part, size in parts.items() if size is not None)
    log.info("estimate: %s (of it %.2f GiB hidden states while it runs)", said, found.mapped / report.GIB)
    if found.host - report.resident_memory() > report.available_memory():
        log.warning("that is more host memory than is free: use fewer windows, or --host_memory to map them from files")
    tokens = flows.reconstruction * flows.windows.shape[1]
    rows = max(module.d_in for module in modules)
    if tokens < rows:
        log.warning(
            "%d calibration tokens for Gram matrices of %d rows: at least %d windows would be needed",
            tokens, rows, -(-rows // flows.windows.shape[1]),
        )  # fmt: skip


def shapes_of(model: PreTrainedModel, described: list[DecoderLayer], modules: list[Module]) -> Shapes:
    """Of the layer with most numbers."""
    shape = {module.name: (module.d_out, module.d_in) for module in modules}

    def groups_of(layer: DecoderLayer) -> tuple[tuple[tuple[int, int], ...], ...]:
        return tuple(tuple(shape[f"{layer.name}.{name}"] for name in group) for group in layer.groups)

    embeddings: Any = model.get_input_embeddings()
    layers = tuple(f"{layer.name}." for layer in described)
    rest = sum(tensor.numel() for name, tensor in model.named_parameters() if not name.startswith(layers))
    largest = max(described, key=lambda layer: sum(m * n for group in groups_of(layer) for m, n in group))
    attention = sum(group[0] in largest.attention for group in largest.groups)
    return Shapes(
        width=embeddings.weight.shape[1],
        layers=len(described),
        groups=groups_of(largest),
        attention=attention,
        rest=rest,
        size=embeddings.weight.element_size(),
    )


def work_of(options: Namespace, modules: list[Module], flows: Flows, *, batch: int, processes: int = 1) -> Work:
    """What each of so many processes does, as the flags ask for it, with ranks as uniform allocation gives them."""
    recipe = recipe_of(options)
    solver = make_solver(
        options.prune, options.reconstruct_step, mix_ratio=recipe.old_output_factor, drift_ratio=recipe.drift_factor
    )
    ranks = uniform(Budget(modules, options.density, storage_of(options)))
    length = flows.windows.shape[1]
    profiles = options.allocation in PROFILED or recipe.output_shrinkage is not None or recipe.token_power
    two = solver.needs_low_rank_flow
    return Work(
        tokens=-(-flows.needed_by(solver).numel() // processes),
        batch_tokens=min(batch, len(flows.windows)) * length,
        flows=2 if two else 1,
        states=2 + bool(options.refine_steps) if two else 1,
        profiled=min(options.profile_nsamples, len(flows.windows)) * length if profiles else 0,
        square=solver.needs_dense_gram + solver.needs_gram + solver.needs_cross,
        drift=int(solver.needs_drift),
        stored=sum(LOW_RANK.stored(ranks[module.name], module.d_out, module.d_in) for module in modules),
        weighted=recipe.output_shrinkage is not None,
    )
