"""A checkpoint as the dense model that it computes, for tools that do not know the format."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from component.checkpoint.choose import is_compressed
from component.checkpoint.reading import read_checkpoint
from component.checkpoint.writer import check_target, refuse_existing
from utils import gguf_writer, models
from utils.sources import Source


class Exported(NamedTuple):
    """dtype: of what was written; size: its bytes; record: of the run that made the checkpoint."""

    dtype: str
    size: int
    record: dict[str, Any]


def export(source: Source, target: Path, *, name: str, as_gguf: bool, dtype: str | None) -> Exported:
    """Write the model to `target`, a GGUF file or a transformers folder.

    name: that a GGUF file has inside; dtype: None for that of the source.

    Raises: UsageError where the target exists, or the model or its tokenizer has no faithful form in the format.
    """
    refuse_existing(target, "move it away or give a --prefix")
    check_target(target, "", False)
    tokenizer = models.load_tokenizer(source)
    compressed = is_compressed(source)
    record = read_checkpoint(source.location).record if compressed else {}
    config = transformers.AutoConfig.from_pretrained(source.location) if compressed else models.load_config(source)
    written = dtype or record.get("dtype") or models.default_dtype_name(source, config, torch.device("cpu"))
    if as_gguf:
        written = gguf_writer.dtype_for(written, asked=dtype is not None)
        gguf_writer.check_config(config)
        words = gguf_writer.vocabulary_of(tokenizer, config.vocab_size)

    model = models.load_model(source, torch.float32 if as_gguf else models.DTYPES[written])
    if compressed:
        model = dense(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _beside(target) as unfinished:
        if as_gguf:
            gguf_writer.write(unfinished, model, words, dtype=models.DTYPES[written], name=name)
        else:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    size = sum(path.stat().st_size for path in ([target] if as_gguf else target.iterdir()))
    return Exported(written, size, record)


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
