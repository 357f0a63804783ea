"""--mode m: a dense model in, a folder of low-rank factors out."""

import logging
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from component.folder import densities, files_beside, folder_config, layer_entries, load_layer, rest_of
from component.job import Job, prepare
from component.plan import plan_as_json
from component.planner import (
    Planner,
    announce,
    attention_densities,
    check_budget,
    draft_of,
    modules_of,
    profile_for,
    recipe_of,
)
from component.streaming import Flows, Refinement, compress_layers
from component.tuning import Recipe, candidates, choose, held_out_perplexity, tunable
from utils import checkpoint as files
from utils import models, report
from utils.attention import repeat_heads
from utils.checkpoint import CheckpointWriter
from utils.layers import describe_layers

log = logging.getLogger("pifa")

BATCH_TOKENS = 8192  # calibration tokens that go through a layer at once


def run(options: Namespace) -> dict[str, Any]:
    """Compress --model and write the checkpoint; returns the result record. Everything is checked before the work."""
    device = torch.device(options.DEV)
    watch = report.Stopwatch(device)
    job = prepare(options)
    folder, dtype = job.folder, job.dtype
    if folder.exists() and files.is_finished(folder):
        log.warning("%s is finished already", folder)
        return files.read_checkpoint(folder).record

    model = models.load_model(job.source, dtype)
    if device.type == "cuda":
        repeat_heads(model)
    described = describe_layers(model)
    modules = modules_of(model, described)
    check_budget(options, modules)
    batch = max(1, BATCH_TOKENS // options.model_seq_len)
    flows = Flows(job.windows, options.pruning_nsamples, options.reconstruct_nsamples, batch)
    announce(options, model, modules, flows, device)
    start, names = recipe_of(options), tunable(options)
    loaded = watch.seconds()
    recipes = candidates(start, names, max(options.tune, 1))
    planner = Planner(options, modules, device, profile_for(job, model, described, recipes, device, batch))
    for number in range(2, options.passes + 1):
        draft = draft_of(planner, start, job, model, described, device, batch, number)
        planner = replace(planner, profile=profile_for(job, model, described, recipes, device, batch, draft))
    profiled = watch.seconds()
    refinement = Refinement(options.refine_steps, start.drift_factor, options.seed) if options.refine_steps else None

    def compressed(recipe: Recipe, finished=lambda index, layer: False) -> Iterator[tuple[int, nn.Module]]:
        plan, solver = planner.plan(recipe), planner.solver(recipe)
        return compress_layers(model, described, plan, solver, flows, device, dtype, finished, refinement)

    def judge(recipe: Recipe) -> float:
        return held_out_perplexity(model, compressed(recipe), job.held_out, device, batch)

    chosen = files.settled(folder)
    if chosen is None:
        recipe, tuned = choose(start, attention_densities(options, modules), names, options.tune, judge)
        chosen = {"recipe": asdict(recipe), "tuned": tuned}
    recipe = Recipe(**chosen["recipe"])
    plan = planner.plan(recipe)
    writer = CheckpointWriter(folder, job.identity["hash"], options.resume)
    writer.settle(chosen)

    def finished(index: int, layer: nn.Module) -> bool:
        shard = files.layer_shard(index)
        if not writer.finished(shard):
            return False
        load_layer(layer, described[index], plan, files.open_shard(folder / shard), dtype)
        return True

    for index, layer in compressed(recipe, finished):
        shard = files.layer_shard(index)
        if not writer.finished(shard):
            writer.write(shard, {f"{described[index].name}.{key}": t for key, t in layer.state_dict().items()})
    if not writer.finished(files.REST):
        writer.write(files.REST, rest_of(model, described))

    entries = layer_entries(modules, plan)
    with tempfile.TemporaryDirectory() as temporary:
        files.write_json(Path(temporary) / "plan.json", plan_as_json(plan))
        beside = files_beside(Path(temporary), model, job.tokenizer)
        writer.describe(folder_config(model, dtype, entries), beside)
    return writer.seal(
        {
            **settings_of(job, recipe, chosen["tuned"]),
            "profile_seconds": round(profiled - loaded, 3),
            **watch.readings(),
            **densities(folder, entries, planner.storage, options.density),
            "ranks": {module.name: plan[module.name] for module in modules},
            "device": report.device_name(device),
            "versions": report.versions(),
        }
    )


def settings_of(job: Job, recipe: Recipe, tuned: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of the record that says what was done: the flags, and of what was chosen the choice."""
    constants = asdict(recipe)
    attention = constants.pop("attention_density")
    return {
        "mode": "m",
        "kind": "lowrank",
        "command": job.options.command,
        "path": str(job.folder),
        **job.identity["settings"],
        **constants,
        "attn_ratio": None if attention is None else round(1 - attention, 12),
        **({"tuned": tuned} if tuned else {}),
    }
