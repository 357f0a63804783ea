"""The engine of --mode finetune: trains the factors of a checkpoint, and writes a checkpoint of the same format."""

import logging
from typing import Any

import torch
from torch import Tensor

from component.checkpoint import reading as files
from component.checkpoint.choose import find_checkpoint, model_in
from component.checkpoint.derive import Derivation
from component.checkpoint.names import ORIGINAL
from component.checkpoint.reading import Checkpoint
from component.checkpoint.writer import CheckpointWriter
from component.finetune import data as rows_of
from component.finetune import lora, state
from component.finetune.curves import CURVES, PLOT, averaged, write_curves
from component.finetune.material import read_material, with_own_text
from component.finetune.names import SELF
from component.finetune.settings import Settings
from component.finetune.stages import stages_of, tune
from utils import models, report
from utils.endings import one_line_endings
from utils.errors import RunError, UsageError
from utils.sources import Source, find_source
from utils.whole_files import hash_of

log = logging.getLogger("pifa")


@one_line_endings()
def finetune_folder(settings: Settings) -> dict[str, Any]:
    """Fine-tune a checkpoint into `<its name>-ft-<8 hex>`; returns the result record.

    Raises: UsageError for settings, data or checkpoints that can't be, RunError where numbers stop being finite.
    """
    watch = report.Stopwatch(torch.device(settings.request.device))
    if settings.order != "full":
        lora.check_installed(settings.order)
    shares = rows_of.parse_mixture(settings.data_path)
    source = find_checkpoint(
        settings.request.model_path,
        settings.request.save_path,
        passed_over=("finetune", "quantize"),
        no_original="--mode finetune trains factors, which the original model has not: run --mode m first",
        refusal=_refusal,
    )
    teacher = find_teacher(settings.teacher, source)
    stages = stages_of(settings.order, source.layers)
    material = read_material(shares, models.load_tokenizer(model_in(source)), settings.cutoff_len)
    if teacher and SELF in material.names:
        material = with_own_text(material, teacher, settings)
    data_hash = hash_of([rows_of.hash_of_rows(rows) for rows in material.rows])
    decisive = {"data": data_hash, **settings.as_json()}
    new = Derivation(request=settings.request, source=source, suffix="-ft-{hash}", decisive=decisive)
    if record := new.finished():
        state.remove_state(new.folder)
        return record
    source.verify()

    with new.writer() as writer:
        steps = settings.steps(sum(material.counts))
        used = material.described(steps * settings.batch_size)
        log.info("data: %s", ", ".join(f"{entry['name']} {entry['passes']:g} times" for entry in used))
        writer.settle({"steps": steps})  # from here on the folder outlives a run that is ended
        curves, factors = tune(settings, source, stages, material=material, teacher=teacher, folder=new.folder)
        write_curves(new.folder, curves)
        write_weights(writer, source, factors, dtype=models.DTYPES[new.dtype])
        writer.describe(new.config(source.layers), new.files_beside(own=(CURVES, PLOT)))
        trained = {
            **settings.as_json(),
            "steps": steps,
            "skipped_steps": {stage: sum(point["loss"] is None for point in curve) for stage, curve in curves.items()},
            "data": used,
            "data_sha256": data_hash,
        }
        losses = {stage: averaged(curve) for stage, curve in curves.items()}
        own = {"finetune": trained, "losses": losses, **new.densities(source.layers)}
        sealed = writer.seal(new.record("finetune", watch, own))
        state.remove_state(new.folder)
        return sealed


def _refusal(source: Checkpoint) -> str | None:
    if source.kind == "quantized":
        return f"{source.folder} is quantized: fine-tune {source.record['source']} and quantize again"
    return None


def find_teacher(name: str | None, source: Checkpoint) -> Source | None:
    """`original` is what the checkpoint was made from. Raises: UsageError where it has other words."""
    if name is None:
        return None
    teacher = find_source(source.record["model"] if name == ORIGINAL else name)
    words, known = models.load_config(teacher).vocab_size, source.config["vocab_size"]
    if words != known:
        raise UsageError(f"--teacher {name} has {words} words and {source.folder} {known}: it can't teach that")
    return teacher


@torch.no_grad()
def write_weights(
    writer: CheckpointWriter, source: Checkpoint, factors: dict[str, Tensor], *, dtype: torch.dtype
) -> None:
    """The source's shards with the new factors in place of the old.

    Raises: RunError for a factor that `dtype` can't hold.
    """
    for shard in sorted(source.manifest["shards"]):
        if writer.finished(shard):
            continue
        tensors = files.open_shard(source.folder / shard)
        for name in tensors.keys() & factors.keys():
            tensors[name] = factors[name].cpu()
        stored = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        for name in tensors.keys() & factors.keys():
            if not stored[name].isfinite().all():
                raise RunError(f"{name} is not finite in {dtype}: write it as bfloat16 or float32")
        writer.write(shard, stored)
