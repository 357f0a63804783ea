"""--mode m: a dense model in, a folder of low-rank factors out."""

import contextlib
import logging
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from component.checkpoint import reading as files
from component.checkpoint.carried import files_beside, folder_config, rest_of
from component.checkpoint.counting import densities
from component.checkpoint.entries import kind_of, load_layer
from component.checkpoint.writer import CheckpointWriter
from component.compress.auto_planner import check_auto, planner_of
from component.compress.channel_planner import check_narrow
from component.compress.estimate import Machine, estimate, waiting_batches
from component.compress.factor_planner import (
    announce,
    check_budget,
    recipe_of,
    shapes_of,
    storage_of,
    work_of,
)
from component.compress.job import Job, prepare
from component.compress.judging import held_out_perplexity
from component.compress.recipe import Recipe, as_json, candidates, choose, tunable
from component.flow.means import Flows, Means
from component.flow.modules import modules_of
from component.flow.streaming import Compression, Refinement, compress_layers
from component.flow.team import Team, team_for
from component.ranks.plan import plan_as_json
from component.solve.names import AUTO, NARROWING
from utils import report
from utils.attention import repeat_heads
from utils.endings import one_line_endings
from utils.errors import UsageError
from utils.layers import HeldLayers, describe_layers
from utils.placement import Shelf, free_bytes, wake
from utils.source_weights import open_model
from utils.whole_files import write_json

log = logging.getLogger("pifa")

BATCH_TOKENS = 8192  # calibration tokens that go through a layer at once


@one_line_endings()
def run(options: Namespace) -> dict[str, Any]:
    """Compress --model and write the checkpoint; returns the result record. Everything is checked before the work.

    Under torchrun every process calls this, with the same flags; the first one writes.
    """
    with team_for(torch.device(options.DEV)) as (team, device):
        watch = report.Stopwatch(device)
        job = _prepared(options, team)
        if record := team.agreed(files.finished_record(job.folder) if team.first else None):
            return record
        with contextlib.ExitStack() as held:
            writer = None
            if team.first:
                writer = held.enter_context(CheckpointWriter(job.folder, job.identity["hash"], options.resume))
            record = _compress(job, writer, watch, team)
        return team.agreed(record)


def _prepared(options: Namespace, team: Team) -> Job:
    """The first process checks, and fetches what there is to fetch; the others then find its folder begun."""
    if options.prune == NARROWING:
        check_narrow(options, team.size)
    if options.prune == AUTO:
        check_auto(options, team.size)
    if team.size > 1 and options.refine_steps:
        raise UsageError("--refine_steps tunes on all windows at once: start it without torchrun")
    if team.first:
        job = prepare(options)
        team.wait()
        return job
    log.setLevel(logging.WARNING)  # one process says it all
    team.wait()
    return prepare(Namespace(**{**vars(options), "resume": True}))


def _compress(job: Job, writer: CheckpointWriter | None, watch: report.Stopwatch, team: Team) -> dict[str, Any]:
    """writer: None in all processes but the first."""
    options, folder, dtype, device = job.options, job.folder, job.dtype, watch.device
    limit = options.host_memory
    shelf = Shelf(None if limit is None else int(limit * report.GIB), folder.parent)
    wake(device)
    machine = Machine(free_bytes(device), shelf.limit, report.resident_memory())
    model, source = open_model(job.source, dtype)
    if device.type == "cuda":
        repeat_heads(model)
    described = describe_layers(model, source)
    modules = modules_of(model, described)
    if options.prune != NARROWING:
        check_budget(options, modules)
    batch = max(1, BATCH_TOKENS // options.model_seq_len)
    flows = Flows(job.windows, whitening=options.pruning_nsamples, reconstruction=options.reconstruct_nsamples)
    shapes = shapes_of(model, described, modules)
    work = work_of(options, modules, flows, batch=batch, processes=team.size)
    announce(options, modules, flows, device, estimate(shapes, work, machine, isinstance(source, HeldLayers)))
    waiting = waiting_batches(shapes, work, machine)
    means = Means(device, source, batch=batch, shelf=shelf, team=team, waiting=waiting)
    start, names = recipe_of(options), tunable(options.reconstruct_step, options.allocation)
    recipes = candidates(start, names, max(options.tune, 1))
    loaded = watch.seconds()
    planner = planner_of(job, model, described, modules, start, recipes, means)
    profiled = watch.seconds()
    refinement = (
        Refinement(steps=options.refine_steps, drift_ratio=start.drift_factor, seed=options.seed)
        if options.refine_steps
        else None
    )

    def compressed(recipe: Recipe, finished=lambda index, layer: False) -> Iterator[tuple[int, nn.Module]]:
        compression = Compression(
            planner.plan(recipe),
            planner.solver(recipe),
            dtype=dtype,
            layer_solver=planner.narrowing(recipe),
            refinement=refinement,
        )
        return compress_layers(model, described, compression, flows=flows, means=means, finished=finished)

    def judge(recipe: Recipe) -> float:
        return team.agreed(held_out_perplexity(model, compressed(recipe), job.held_out, device=device, batch=batch))

    chosen = team.agreed(writer and writer.settled)
    if chosen is None:
        recipe, tuned = choose(start, planner.kinds(start), names, options.tune, judge)
        chosen = {"recipe": as_json(recipe), "tuned": tuned}
    recipe = Recipe(**chosen["recipe"])
    plan = planner.plan(recipe)
    entries = planner.entries(plan)
    if writer:
        writer.settle(chosen)
    shards = [files.layer_shard(index) for index in range(len(described))]
    done = team.agreed(writer and {shard for shard in shards if writer.finished(shard)})

    def finished(index: int, layer: nn.Module) -> bool:
        if shards[index] in done:
            load_layer(layer, described[index], entries, files.open_shard(folder / shards[index]))
        return shards[index] in done

    layer_seconds: list[float] = []  # of those that this run has solved
    before = watch.seconds()
    for index, layer in compressed(recipe, finished):
        if shards[index] not in done:
            if writer:
                tensors = {f"{described[index].name}.{key}": t for key, t in layer.state_dict().items()}
                writer.write_behind(shards[index], tensors)
            layer_seconds.append(round(watch.seconds() - before, 3))
            if len(layer_seconds) == 1:
                one, left = layer_seconds[0], len(described) - index - 1
                log.info("%.1f s for one layer, about %.0f s for the %d to come", one, one * left, left)
        before = watch.seconds()
    if writer is None:
        return {}
    if not writer.finished(files.REST):
        writer.write_behind(files.REST, rest_of(model, described))

    kind = kind_of(entries)
    with tempfile.TemporaryDirectory() as temporary:
        write_json(Path(temporary) / "plan.json", plan_as_json(plan))
        beside = files_beside(Path(temporary), model, job.tokenizer)
        writer.describe(folder_config(model, dtype, entries), beside)
    return writer.seal(
        {
            **settings_of(job, recipe, chosen["tuned"]),
            **({"processes": team.size} if team.size > 1 else {}),
            "profile_seconds": round(profiled - loaded, 3),
            "layer_seconds": layer_seconds,
            **watch.readings(),
            **densities(
                folder,
                entries,
                ranks_paid_for="channels" if kind == "narrow" else storage_of(options).name,
                asked=options.density,
            ),
            "kind": kind,
            "ranks": {module.name: plan[module.name] for module in modules},
            "device": report.device_name(device),
            "versions": report.versions(),
        }
    )


def settings_of(job: Job, recipe: Recipe, tuned: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of the record that says what was done: the flags, and of what was chosen the choice."""
    constants = as_json(recipe)
    attention = constants.pop("attention_density")
    return {
        "mode": "m",
        "command": job.options.command,
        "path": str(job.folder),
        **job.identity["settings"],
        **constants,
        "attn_ratio": None if attention is None else round(1 - attention, 12),
        **({"tuned": tuned} if tuned else {}),
    }
