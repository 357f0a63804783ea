"""What fine-tuning learns from: rows of tokens by source, their shares, and the batches of a stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from component.finetune import data as rows_of
from component.finetune.data import Batch, Row, Share
from component.finetune.loop import Schedule
from component.finetune.names import SELF
from component.finetune.self_text import written_rows
from component.finetune.settings import Settings
from utils import models
from utils.errors import UsageError
from utils.sources import Source
from utils.whole_files import hash_of


@dataclass(frozen=True)
class Material:
    """The rows of every source of the mixture, and the sources' shares of it."""

    names: list[str]
    rows: list[list[Row]]
    weights: list[float]

    @property
    def counts(self) -> list[int]:
        return [len(rows) for rows in self.rows]

    def described(self, total: int) -> list[dict[str, Any]]:
        """For the record, of a stage that draws `total` rows: how often it sees each source as a whole."""
        quotas = rows_of.quotas(self.weights, total)
        return [
            {"name": name, "rows": count, "weight": weight, "passes": round(quota / count, 3)}
            for name, count, weight, quota in zip(self.names, self.counts, self.weights, quotas, strict=True)
        ]


def read_material(shares: Sequence[Share], tokenizer: Any, length: int) -> Material:
    """The rows of every share, none longer than `length` tokens; `self` is left empty."""
    rows = [[] if share.name == SELF else rows_of.read_rows(share.name, tokenizer, length) for share in shares]
    weights = [share.weight or len(own) for share, own in zip(shares, rows, strict=True)]
    return Material([share.name for share in shares], rows, weights)


def with_own_text(material: Material, teacher: Source, settings: Settings) -> Material:
    """The same with rows in `self`, as many as its share of a stage needs, kept in a file under --save_path.

    Raises: UsageError where the share is less than a row.
    """
    assert settings.max_steps is not None
    request = settings.request
    place = material.names.index(SELF)
    count = rows_of.quotas(material.weights, settings.max_steps * settings.batch_size)[place]
    if not count:
        raise UsageError(f"the share of {SELF} in --data_path is less than a row of all steps: leave it out")
    dtype, texts = models.DTYPES[settings.compute_dtype], [row for rows in material.rows for row in rows]
    decisive = [models.fingerprint(teacher), rows_of.hash_of_rows(texts), count, settings.cutoff_len, settings.seed]
    name = f"{request.prefix}{teacher.name}-self-{hash_of([*decisive, str(dtype)])[:8]}.safetensors"

    def load() -> Any:
        model: Any = models.load_model(teacher, dtype)
        return model.to(request.device)

    path = request.save_path / name
    own = written_rows(path, load, texts, count=count, length=settings.cutoff_len, seed=settings.seed)
    rows = [own if index == place else rows for index, rows in enumerate(material.rows)]
    return Material(material.names, rows, material.weights)


class Batches:
    """The micro-batches of a step, by its number."""

    def __init__(self, material: Material, settings: Settings, schedule: Schedule):
        self.material, self.settings = material, settings
        total = schedule.steps * settings.batch_size
        self.drawn = rows_of.draw(material.counts, material.weights, total=total, seed=schedule.seed)

    def __call__(self, step: int) -> list[Batch]:
        size, micro = self.settings.batch_size, self.settings.micro_batch_size
        rows = [self.material.rows[source][row] for source, row in self.drawn[step * size : (step + 1) * size]]
        return [rows_of.collate(rows[start : start + micro]) for start in range(0, size, micro)]
