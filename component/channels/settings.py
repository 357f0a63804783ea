"""What --mode bi is told. Light: the front door imports it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class InfluenceSettings:
    """How the influence of a model's layers is measured, and where it goes; fields are named after the flags.

    density: of the widths that are shown. bi_score: path of the file, or None for one under save_path. dataset to seed:
    of the text and its windows. device, dtype: what it is measured on and in, the latter None for the default.
    """

    model: str
    save_path: str
    prefix: str
    bi_score: str | None
    density: float
    dataset: str | None
    reconstruct_nsamples: int
    heldout_nsamples: int
    model_seq_len: int
    seed: int
    device: str
    dtype: str | None
    command: str
