"""--mode m: a dense model in, a folder of low-rank factors out."""

import json
import logging
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import component.integration
import component.linear
from component.allocation import ALLOCATIONS, PROFILED, Budget, Module, Plan
from component.cost import LOW_RANK, PIVOTED, StorageFormat
from component.integration import FORMAT_VERSION, METHOD
from component.plan import plan_as_json, read_plan
from component.profile import Profile, make_profile
from component.sensitivity import output_weighting
from component.solvers import make_solver
from component.streaming import Flows, compress_layers
from utils import checkpoint as files
from utils import data, models, report
from utils.checkpoint import CheckpointWriter
from utils.layers import DecoderLayer, describe_layers, uncalled_linears
from utils.models import Source

log = logging.getLogger("pifa")

BATCH_TOKENS = 8192  # calibration tokens that go through a layer at once


def run(options: Namespace) -> dict[str, Any]:
    """Compress --model and write the checkpoint; returns the result record. Everything is checked before the work."""
    device = torch.device(options.DEV)
    watch = report.Stopwatch(device)
    source = models.find_source(options.model)
    config = models.load_config(source)
    dtype = models.DTYPES[options.dtype or models.default_dtype_name(source, config, device)]
    tokenizer = models.load_tokenizer(source)
    text = data.read_text(options.dataset[0] if options.dataset else None, "train")
    windows = data.random_windows(
        data.tokenize(tokenizer, text.text),
        max(options.pruning_nsamples, options.reconstruct_nsamples),
        options.model_seq_len,
        options.seed,
    )
    identity = _identity(options, source, config, text.name, windows, dtype)
    folder = Path(options.save_path) / _folder_name(options, source, identity)
    files.check_target(folder, identity["hash"], options.resume)
    if folder.exists() and files.is_finished(folder):
        log.warning("%s is finished already", folder)
        return files.read_checkpoint(folder).record

    model = models.load_model(source, dtype)
    described = describe_layers(model)
    modules = _modules(model, described)
    batch = max(1, BATCH_TOKENS // options.model_seq_len)
    flows = Flows(windows, options.pruning_nsamples, options.reconstruct_nsamples, batch)
    _announce(options, model, modules, flows, device)
    storage = PIVOTED if options.use_pifa else LOW_RANK
    attention = None if options.attn_ratio is None else 1 - options.attn_ratio
    profile = _profile(options, source, identity, model, described, windows, device)
    measured = (profile.curves, profile.outliers, profile.influence) if profile else ()
    plan = _plan(options, Budget(modules, options.density, storage, attention, *measured))
    weighting = None
    if profile and options.output_shrinkage is not None:
        weighting = partial(_weighting, profile, options.output_shrinkage)
    solver = make_solver(
        options.prune, options.reconstruct_step, options.old_output_factor, options.drift_factor, weighting
    )
    writer = CheckpointWriter(folder, identity["hash"], options.resume)

    def finished(index: int, layer: nn.Module) -> bool:
        shard = files.layer_shard(index)
        if not writer.finished(shard):
            return False
        load_layer(layer, described[index], plan, files.open_shard(folder / shard), dtype)
        return True

    for index, layer in compress_layers(model, described, plan, solver, flows, device, dtype, finished):
        shard = files.layer_shard(index)
        if not writer.finished(shard):
            writer.write(shard, {f"{described[index].name}.{key}": t for key, t in layer.state_dict().items()})
    if not writer.finished(files.REST):
        writer.write(files.REST, _rest(model, described))

    entries = layer_entries(modules, plan)
    with tempfile.TemporaryDirectory() as temporary:
        files.write_json(Path(temporary) / "plan.json", plan_as_json(plan))
        beside = _files_beside(Path(temporary), model, tokenizer)
        writer.describe(folder_config(model, dtype, entries), beside)
    record = {
        "mode": "m",
        "kind": "lowrank",
        "command": options.command,
        "path": str(folder),
        **identity["settings"],
        **watch.readings(),
        **densities(folder, entries, storage, options.density),
        "ranks": {module.name: plan[module.name] for module in modules},
        "device": report.device_name(device),
        "versions": report.versions(),
    }
    return writer.seal(record)


def _plan(options: Namespace, budget: Budget) -> Plan:
    """By the named allocation, or from the user's file."""
    if options.allocation in ALLOCATIONS:
        return ALLOCATIONS[options.allocation](budget)
    return read_plan(Path(options.allocation), budget.modules)


def _profile(options, source: Source, identity, model, described, windows: Tensor, device) -> Profile | None:
    """The profile, where allocation or solver asks for one: made here, or taken from an earlier run."""
    if options.allocation not in PROFILED and options.output_shrinkage is None:
        return None
    rows = windows[: options.profile_nsamples]
    settings = {
        "model": options.model,
        "weights": identity["weights"],
        "windows_sha256": files.hash_of(rows.tolist()),
        "seed": options.seed,
        "output_shrinkage": options.output_shrinkage,
    }
    hashed = files.hash_of(settings)
    default = Path(options.save_path) / f"profile_{source.name}_{hashed[:8]}"
    folder = Path(options.profiling_mat_path or default)
    return make_profile(folder, hashed, model, described, rows, options.output_shrinkage, device, options.seed)


def _weighting(profile: Profile, shrinkage: float, name: str) -> Tensor:
    return output_weighting(profile.output_gram(name), shrinkage, name)


def _identity(options, source: Source, config, dataset: str, windows: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that decides the bytes of the checkpoint, and its hash."""
    settings = {
        "model": options.model,
        "revision": getattr(config, "_commit_hash", None),
        "dataset": dataset,
        "windows_sha256": files.hash_of(windows.tolist()),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": options.seed,
        "prune": options.prune,
        "allocation": options.allocation,
        "density_asked": options.density,
        "overall_ratio": round(1 - options.density, 12),
        "attn_ratio": options.attn_ratio,
        "reconstruct_step": options.reconstruct_step,
        "old_output_factor": options.old_output_factor,
        "drift_factor": options.drift_factor,
        "output_shrinkage": options.output_shrinkage,
        "profile_nsamples": options.profile_nsamples,
        "use_pifa": options.use_pifa,
        "pruning_nsamples": options.pruning_nsamples,
        "reconstruct_nsamples": options.reconstruct_nsamples,
        "model_seq_len": options.model_seq_len,
    }
    weights = _fingerprint(source)
    decisive = {**settings, "weights": weights}
    if Path(options.allocation).is_file():
        decisive["plan"] = files.sha256(Path(options.allocation))
    return {"settings": settings, "weights": weights, "hash": files.hash_of(decisive)}


def _fingerprint(source: Source) -> dict[str, Any]:
    """Names and sizes of a local model's files, so that a changed one is noticed; a hub model has its revision."""
    folder = Path(source.location)
    if source.gguf_file:
        return {source.gguf_file: files.sha256(folder / source.gguf_file)}
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def _folder_name(options, source: Source, identity: dict[str, Any]) -> str:
    allocation = Path(options.allocation).stem
    parts = (options.prefix + source.name, options.prune, f"{options.density:g}", allocation, identity["hash"][:8])
    return "_".join(parts)


def _modules(model: PreTrainedModel, described: list[DecoderLayer]) -> list[Module]:
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


def _announce(options, model: PreTrainedModel, modules: list[Module], flows: Flows, device: torch.device) -> None:
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


def load_layer(layer: nn.Module, described: DecoderLayer, plan: Plan, tensors: dict[str, Tensor], dtype) -> None:
    """Turn a copy of a dense layer into the finished one that an earlier run stored."""
    for name in described.linears():
        rank = plan[f"{described.name}.{name}"]
        if rank is not None:
            linear = layer.get_submodule(name)
            like = {"device": linear.weight.device, "dtype": dtype}
            layer.set_submodule(
                name,
                component.linear.LowRankLinear(
                    linear.in_features, linear.out_features, rank, linear.bias is not None, **like
                ),
            )
    layer.load_state_dict({name.removeprefix(f"{described.name}."): t for name, t in tensors.items()})


def _rest(model: nn.Module, described: list[DecoderLayer]) -> dict[str, Tensor]:
    """Embeddings, norms and head; a weight tied to another is stored once."""
    layers = tuple(f"{layer.name}." for layer in described)
    kept: dict[str, Tensor] = {}
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(layers)}
    for name in sorted(tensors, key=lambda name: (name in tied, name)):
        if not any(tensors[name].data_ptr() == tensor.data_ptr() for tensor in kept.values()):
            kept[name] = tensors[name]
    return kept


def layer_entries(modules: list[Module], plan: Plan) -> dict[str, dict[str, Any]]:
    """The `layers` of the quantization config."""
    entries: dict[str, dict[str, Any]] = {}
    for module in modules:
        rank = plan[module.name]
        entries[module.name] = {
            "kind": "dense" if rank is None else "lowrank",
            "rank": min(module.d_out, module.d_in) if rank is None else rank,
            "in_features": module.d_in,
            "out_features": module.d_out,
        }
    return entries


def folder_config(model: PreTrainedModel, dtype: torch.dtype, entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """config.json: the family's own, plus the format and the file that loads it where this package is absent."""
    config = json.loads(model.config.to_json_string(use_diff=True))
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["auto_map"] = {"AutoConfig": "integration.AutoConfigWithPIFA"}
    config["quantization_config"] = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "layers": entries}
    return config


def _files_beside(folder: Path, model: PreTrainedModel, tokenizer) -> list[Path]:
    """Tokenizer, generation config and the loader, as files to copy."""
    tokenizer.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    loader = [Path(str(module.__file__)) for module in (component.integration, component.linear)]
    return sorted(path for path in folder.iterdir() if path.is_file()) + loader


def densities(folder: Path, entries: dict[str, dict[str, Any]], storage: StorageFormat, asked: float) -> dict[str, Any]:
    """The densities of a record, counted from the tensors on disk; density_pivoted from the ranks."""
    counts = files.count_numbers(folder, entries)
    pivoted = sum(
        PIVOTED.stored(None if entry["kind"] == "dense" else entry["rank"], entry["out_features"], entry["in_features"])
        for entry in entries.values()
    )
    return {
        "density": counts.density,
        "density_asked": asked,
        "density_pivoted": pivoted / counts.dense_linears,
        "density_model": counts.density_model,
        "linear_mib": round(counts.linear_bytes / 2**20, 3),
        "ranks_paid_for": storage.name,
    }
