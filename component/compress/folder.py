"""--mode m: a dense model in, a folder of low-rank factors out, layer by layer, so that a run can be gone on with."""

import contextlib
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from component.checkpoint import reading as files
from component.checkpoint.carried import describe_folder, rest_of
from component.checkpoint.counting import densities
from component.checkpoint.entries import kind_of, load_layer, paid_for
from component.checkpoint.writer import CheckpointWriter
from component.compress.estimate import Machine
from component.compress.job import Job, Place, prepare
from component.compress.pipeline import Design, Pipeline, check_method, planned
from component.compress.recipe import Recipe, as_json, choice_in_record
from component.compress.settings import Settings
from component.compress.task import Profiles, Task, task_for
from component.flow.means import Means
from component.flow.team import Team, team_for
from component.ranks.plan import plan_as_json
from utils import report
from utils.attention import repeat_heads
from utils.endings import one_line_endings
from utils.placement import Shelf, free_bytes, wake
from utils.source_weights import open_model

log = logging.getLogger("pifa")


@one_line_endings()
def compress_into_folder(settings: Settings, place: Place) -> dict[str, Any]:
    """Compress the model and write the checkpoint; returns the result record. Everything is checked before the work.

    Under torchrun every process calls this, with the same flags; the first one writes.

    Raises: UsageError for what can't be, RunError where numbers stop being finite.
    """
    with team_for(torch.device(place.device)) as (team, device):
        watch = report.Stopwatch(device)
        job = _prepared(settings, place, team)
        if record := team.agreed(files.finished_record(job.folder) if team.first else None):
            return record
        with contextlib.ExitStack() as held:
            writer = None
            if team.first:
                writer = held.enter_context(CheckpointWriter(job.folder, job.identity.hash, place.resume))
            record = _compress(job, writer, watch=watch, team=team)
        return team.agreed(record)


def _prepared(settings: Settings, place: Place, team: Team) -> Job:
    """The first process checks, and fetches what there is to fetch; the others then find its folder begun."""
    check_method(settings, team.size)
    if team.first:
        job = prepare(settings, place)
        team.wait()
        return job
    log.setLevel(logging.WARNING)  # one process says it all
    team.wait()
    return prepare(settings, replace(place, resume=True))


def _compress(job: Job, writer: CheckpointWriter | None, *, watch: report.Stopwatch, team: Team) -> dict[str, Any]:
    """writer: None in all processes but the first, which get no record."""
    task = open_task(job, device=watch.device, team=team)
    loaded = watch.seconds()
    pipeline = planned(task)
    profiled = watch.seconds()
    choice = team.agreed(writer and writer.settled)
    if choice is None:
        recipe, tuned = pipeline.choose()
        choice = {"recipe": as_json(recipe), "tuned": tuned}
    recipe = Recipe(**choice["recipe"])
    design = pipeline.design(recipe)
    if writer:
        writer.settle(choice)  # from here on the folder outlives a run that ends; a plan that can't be leaves none
    layer_seconds = _write_layers(job, pipeline, design=design, writer=writer, watch=watch)
    if writer is None:
        return {}
    if not writer.finished(files.REST):
        writer.write_behind(files.REST, rest_of(task.model, task.described))
    beside = {"plan.json": plan_as_json(design.plan)}
    describe_folder(writer, task.model, job.tokenizer, dtype=job.dtype, entries=design.entries, more=beside)
    return writer.seal(
        {
            "mode": "m",
            "command": job.place.command,
            "path": str(job.folder),
            **job.identity.settings,
            **choice_in_record(recipe, choice["tuned"]),
            **({"processes": team.size} if team.size > 1 else {}),
            "profile_seconds": round(profiled - loaded, 3),
            "layer_seconds": layer_seconds,
            **watch.readings(),
            **densities(
                job.folder,
                design.entries,
                ranks_paid_for=paid_for(design.entries, job.settings.storage),
                asked=job.settings.density,
            ),
            "kind": kind_of(design.entries),
            "ranks": {module.name: design.plan[module.name].number for module in task.modules},
            "device": report.device_name(watch.device),
            "versions": report.versions(),
        }
    )


def open_task(job: Job, *, device: torch.device, team: Team) -> Task:
    """The model of the job, its layers read when they are asked for, ready to be planned."""
    shelf = Shelf.of(job.place.host_memory, job.folder.parent)
    wake(device)
    machine = Machine(free_bytes(device), shelf.limit, report.resident_memory())
    model, source = open_model(job.source, job.dtype)
    if device.type == "cuda":
        repeat_heads(model)
    profiles = Profiles(
        parent=job.place.save_path, name=job.source.name, weights=job.identity.weights, folder=job.place.profile
    )
    return task_for(
        job.settings,
        model,
        source,
        text=job.text,
        machine=machine,
        means=Means(device, source, shelf=shelf, team=team),
        dtype=job.dtype,
        profiles=profiles,
    )


def _write_layers(
    job: Job, pipeline: Pipeline, *, design: Design, writer: CheckpointWriter | None, watch: report.Stopwatch
) -> list[float]:
    """Make every layer that is not there yet, or read it; the seconds of those that this run has solved."""
    described, team = pipeline.task.described, pipeline.task.means.team
    shards = [files.layer_shard(index) for index in range(len(described))]
    done = team.agreed(writer and {shard for shard in shards if writer.finished(shard)})

    def finished(index: int, layer: nn.Module) -> bool:
        if shards[index] in done:
            tensors = files.open_shard(job.folder / shards[index])
            load_layer(layer, described[index], design.entries, tensors=tensors)
        return shards[index] in done

    layer_seconds: list[float] = []
    before = watch.seconds()
    for index, layer in pipeline.layers(design, finished):
        if shards[index] not in done:
            if writer:
                tensors = {f"{described[index].name}.{key}": t for key, t in layer.state_dict().items()}
                writer.write_behind(shards[index], tensors)
            layer_seconds.append(round(watch.seconds() - before, 3))
            if len(layer_seconds) == 1:
                one, left = layer_seconds[0], len(described) - index - 1
                log.info("%.1f s for one layer, about %.0f s for the %d to come", one, one * left, left)
        before = watch.seconds()
    return layer_seconds
