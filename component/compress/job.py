"""--mode m before the model is loaded: source, text, windows, the hash of all that decides the result, the folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from component.checkpoint.writer import check_target
from component.compress.settings import Settings
from utils import data, models
from utils.data import CalibrationWindows
from utils.errors import UsageError
from utils.models import fingerprint
from utils.sources import Source, find_source
from utils.whole_files import hash_of, sha256


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where results go, and what the work is done on; nothing of it decides a result.

    profile: folder of the profile, None for one under save_path. host_memory: GiB of hidden states, None for any.
    """

    save_path: Path
    prefix: str
    resume: bool
    profile: Path | None
    device: str
    host_memory: float | None
    command: str


@dataclass(frozen=True, kw_only=True)
class Identity:
    """settings: of the record; weights: fingerprint of the model; hash: of all that decides the checkpoint's bytes."""

    settings: dict[str, Any]
    weights: dict[str, Any]
    hash: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done, and where to."""

    settings: Settings
    place: Place
    source: Source
    dtype: torch.dtype
    tokenizer: Any
    text: CalibrationWindows
    identity: Identity
    folder: Path


def prepare(settings: Settings, place: Place) -> Job:
    """Everything that can be known, and refused, before the model is loaded. Raises: UsageError."""
    source = find_source(settings.model)
    config = models.load_config(source)
    name = settings.dtype or models.default_dtype_name(source, config, torch.device(place.device))
    dtype = models.DTYPES[name]
    tokenizer = models.load_tokenizer(source)
    text = read_calibration(settings, tokenizer)
    identity = identity_of(settings, source, config=config, text=text, dtype=dtype)
    allocation = Path(settings.allocation).stem
    parts = (place.prefix + source.name, settings.prune, f"{settings.density:g}", allocation, identity.hash[:8])
    folder = place.save_path / "_".join(parts)
    check_target(folder, identity.hash, place.resume)
    return Job(
        settings=settings,
        place=place,
        source=source,
        dtype=dtype,
        tokenizer=tokenizer,
        text=text,
        identity=identity,
        folder=folder,
    )


def read_calibration(settings: Settings, tokenizer: Any) -> CalibrationWindows:
    """The windows that calibrate and those that choose. Raises: UsageError where some are needed and there are none."""
    text = data.calibration_windows(
        tokenizer,
        settings.dataset,
        count=max(settings.pruning_nsamples, settings.reconstruct_nsamples),
        length=settings.model_seq_len,
        held_out=settings.heldout_nsamples,
        seed=settings.seed,
    )
    if not len(text.held_out) and settings.judges:
        raise UsageError(
            "--prune auto, --tune, and --allocation type without --attn_ratio, choose on held-out windows, and there "
            "are none: raise --heldout_nsamples, lower --model_seq_len or take a longer text"
        )
    return text


def identity_of(
    settings: Settings,
    source: Source,
    *,
    config: transformers.PretrainedConfig,
    text: CalibrationWindows,
    dtype: torch.dtype,
) -> Identity:
    """Everything that decides the bytes of the checkpoint, and its hash."""
    known = settings_in_record(settings, text, config=config, dtype=dtype)
    weights = fingerprint(source)
    decisive = {**known, "weights": weights}
    if settings.bi_score:
        decisive["influence"] = sha256(Path(settings.bi_score))
    if Path(settings.allocation).is_file():
        decisive["plan"] = sha256(Path(settings.allocation))
    return Identity(settings=known, weights=weights, hash=hash_of(decisive))


def settings_in_record(
    settings: Settings, text: CalibrationWindows, *, config: transformers.PretrainedConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """The settings, and what came of those that say where to look: the text, its windows, the model's revision."""
    return {
        **settings.as_json(),
        "revision": getattr(config, "_commit_hash", None),
        "dataset": text.dataset,
        "windows_sha256": hash_of(text.windows.tolist()),
        "heldout_nsamples": len(text.held_out),
        "heldout_sha256": hash_of(text.held_out.tolist()),
        "dtype": str(dtype).removeprefix("torch."),
    }
