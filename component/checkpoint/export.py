"""--mode export: a checkpoint as the dense model that it computes, for tools that do not know the format."""

import contextlib
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import component.format.integration  # noqa: F401  (teaches transformers to load checkpoints)
from component.checkpoint import reading as files
from component.checkpoint.writer import check_target
from evaluater import find_model
from utils import gguf_writer as gguf_model
from utils import models, report
from utils.errors import UsageError

FORMATS = ("transformers", "gguf")


def run(options: Namespace) -> dict[str, Any]:
    """Write `<name>-dense/` or `<name>.gguf` under --save_path; returns the result record.

    Raises: UsageError where the target exists, or the model or its tokenizer has no faithful form in the format.
    """
    device = torch.device("cpu")
    watch = report.Stopwatch(device)
    source = find_model(options)
    as_gguf = options.format == "gguf"
    name = options.prefix + source.name
    target = Path(options.save_path) / (f"{name}.gguf" if as_gguf else f"{name}-dense")
    if target.exists():
        raise UsageError(f"{target} exists and nothing is ever overwritten: move it away or give a --prefix")
    check_target(target, "", False)
    tokenizer = models.load_tokenizer(source)
    compressed = (Path(source.location) / files.MANIFEST).is_file()
    stored = files.read_checkpoint(source.location).record if compressed else {}
    config = transformers.AutoConfig.from_pretrained(source.location) if compressed else models.load_config(source)
    dtype = options.dtype or stored.get("dtype") or models.default_dtype_name(source, config, device)
    if as_gguf:
        dtype = gguf_model.dtype_for(dtype, asked=options.dtype is not None)
        gguf_model.check_config(config)
        words = gguf_model.vocabulary_of(tokenizer, config.vocab_size)

    model = models.load_model(source, torch.float32 if as_gguf else models.DTYPES[dtype])
    if compressed:
        model = dense(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _beside(target) as unfinished:
        if as_gguf:
            gguf_model.write(unfinished, model, words, models.DTYPES[dtype], name)
        else:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    return {
        "mode": "export",
        "command": options.command,
        "model": stored.get("model", options.model),
        "dataset": stored.get("dataset"),
        "source": source.location,
        "path": str(target),
        "format": options.format,
        "dtype": dtype,
        "seed": options.seed,
        "density": 1.0,
        "bytes": sum(path.stat().st_size for path in ([target] if as_gguf else target.iterdir())),
        **watch.readings(),
    }


def dense(model: Any) -> Any:
    """The model with every linear an nn.Linear again, in place, and a config that says nothing of what it was.

    The products are rounded to the model's dtype. Folded channels stay in their order, which no output shows.
    """
    model = model.dequantize()
    for name in ("quantization_config", "auto_map"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A name on the same file system that becomes `target` when the block ends well."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as temporary:
        unfinished = Path(temporary) / target.name
        yield unfinished
        unfinished.rename(target)
