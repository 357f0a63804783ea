"""--mode m before the model is loaded: source, text, windows, the hash of all that decides the result, the folder."""

import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from component.checkpoint.writer import check_target
from component.compress.recipe import searches_attention
from component.solve.names import AUTO
from utils import data, models
from utils.errors import UsageError
from utils.models import Source
from utils.whole_files import hash_of, sha256

log = logging.getLogger("pifa")


@dataclass(frozen=True)
class Job:
    """windows: for calibration, held_out: for choosing, both (count, length) int64; identity: settings and hashes."""

    options: Namespace
    source: Source
    dtype: torch.dtype
    tokenizer: Any
    windows: Tensor
    held_out: Tensor
    identity: dict[str, Any]
    folder: Path


def prepare(options: Namespace) -> Job:
    """Everything that can be known, and refused, before the model is loaded. Raises: UsageError."""
    source = models.find_source(options.model)
    config = models.load_config(source)
    dtype = models.DTYPES[options.dtype or models.default_dtype_name(source, config, torch.device(options.DEV))]
    tokenizer = models.load_tokenizer(source)
    text = data.read_text(options.dataset[0] if options.dataset else None, "train")
    length = options.model_seq_len
    before, held_out = data.hold_out(data.tokenize(tokenizer, text.text), options.heldout_nsamples, length)
    count = max(options.pruning_nsamples, options.reconstruct_nsamples)
    windows = data.random_windows(before, count, length, options.seed)
    if not len(held_out) and (
        options.tune or searches_attention(options.allocation, options.attn_ratio) or options.prune == AUTO
    ):
        raise UsageError(
            "--prune auto, --tune, and --allocation type without --attn_ratio, choose on held-out windows, and there "
            "are none: raise --heldout_nsamples, lower --model_seq_len or take a longer text"
        )
    identity = identity_of(options, source, config, text.name, windows, held_out, dtype)
    folder = Path(options.save_path) / _folder_name(options, source, identity)
    check_target(folder, identity["hash"], options.resume)
    return Job(options, source, dtype, tokenizer, windows, held_out, identity, folder)


def identity_of(
    options,
    source: Source,
    config: transformers.PretrainedConfig,
    dataset: str,
    windows: Tensor,
    held_out: Tensor,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Everything that decides the bytes of the checkpoint, and its hash."""
    settings = {
        "model": options.model,
        "revision": getattr(config, "_commit_hash", None),
        "dataset": dataset,
        "windows_sha256": hash_of(windows.tolist()),
        "heldout_nsamples": len(held_out),
        "heldout_sha256": hash_of(held_out.tolist()),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": options.seed,
        "prune": options.prune,
        "allocation": options.allocation,
        "density_asked": options.density,
        "overall_ratio": round(1 - options.density, 12),
        "attn_ratio": options.attn_ratio,
        "rank_multiple": options.rank_multiple,
        "reconstruct_step": options.reconstruct_step,
        "old_output_factor": options.old_output_factor,
        "drift_factor": options.drift_factor,
        "output_shrinkage": options.output_shrinkage,
        "token_power": options.token_power,
        "ridge": options.ridge,
        "passes": options.passes,
        "refine_steps": options.refine_steps,
        "profile_nsamples": options.profile_nsamples,
        "tune": options.tune,
        "use_pifa": options.use_pifa,
        "pruning_nsamples": options.pruning_nsamples,
        "reconstruct_nsamples": options.reconstruct_nsamples,
        "model_seq_len": options.model_seq_len,
    }
    weights = fingerprint(source)
    decisive = {**settings, "weights": weights}
    if bi_score := getattr(options, "bi_score", None):
        decisive["influence"] = sha256(Path(bi_score))
    if Path(options.allocation).is_file():
        decisive["plan"] = sha256(Path(options.allocation))
    return {"settings": settings, "weights": weights, "hash": hash_of(decisive)}


def fingerprint(source: Source) -> dict[str, Any]:
    """Names and sizes of a local model's files, so that a changed one is noticed; a hub model has its revision."""
    folder = Path(source.location)
    if source.gguf_file:
        return {source.gguf_file: sha256(folder / source.gguf_file)}
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def _folder_name(options, source: Source, identity: dict[str, Any]) -> str:
    allocation = Path(options.allocation).stem
    parts = (options.prefix + source.name, options.prune, f"{options.density:g}", allocation, identity["hash"][:8])
    return "_".join(parts)
