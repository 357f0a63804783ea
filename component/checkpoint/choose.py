"""Which checkpoint a mode works on."""

from collections.abc import Callable, Collection
from pathlib import Path

from component.checkpoint.names import ORIGINAL
from component.checkpoint.reading import MANIFEST, Checkpoint, newest_checkpoint, read_checkpoint
from utils import models
from utils.errors import UsageError
from utils.sources import Source, find_source


def find_checkpoint(
    model_path: str | None,
    save_path: Path,
    *,
    kind: str | None = None,
    passed_over: Collection[str] = (),
    no_original: str = "",
    refusal: Callable[[Checkpoint], str | None] = lambda source: None,
) -> Checkpoint:
    """The checkpoint at `model_path`; without a path the newest one under `save_path`.

    kind: of the newest one, None for any. passed_over: modes whose newest result is left for what it was made from.
    no_original: the error line where the original model is named; refusal: checkpoint -> that of one that will not do.

    Raises: UsageError where there is none, or it will not do.
    """
    if model_path == ORIGINAL:
        raise UsageError(no_original)
    if model_path is not None:
        source = read_checkpoint(model_path)
    else:
        source = newest_checkpoint(save_path, kind)
        while source.record["mode"] in passed_over:
            source = read_checkpoint(source.record["source"])
    if line := refusal(source):
        raise UsageError(line)
    return source


def find_model(model: str, model_path: str | None, save_path: Path) -> Source:
    """What `model_path` names: `original` is `model`, None the newest finished checkpoint under `save_path`.

    Raises: UsageError where there is none, or a shard is damaged.
    """
    if model_path == ORIGINAL:
        source = find_source(model)
        models.load_config(source)  # a compressed folder is refused here, before any work
        return source
    checkpoint = find_checkpoint(model_path, save_path)
    checkpoint.verify()
    return model_in(checkpoint)


def is_compressed(source: Source) -> bool:
    """Whether it is a folder of this tool, not a model as others have it."""
    return (Path(source.location) / MANIFEST).is_file()


def model_in(checkpoint: Checkpoint) -> Source:
    """A checkpoint as the source of a model and a tokenizer."""
    return Source(checkpoint.folder.name, str(checkpoint.folder))
