"""What decides the result of --mode m, beside the model's weights and the words of the text. Plain values.

The flags' meanings and defaults are in component/modes/m.py. The JSON of the settings is a part of the run's identity:
a run is gone on with where it is the same.
"""

from dataclasses import asdict, dataclass
from typing import Any

from component.compress.recipe import Recipe
from component.ranks.budget import RANK_FLOOR
from component.ranks.cost import LOW_RANK, PIVOTED, StorageFormat
from component.solve.names import AUTO

UNNAMED = ("density", "dataset", "dtype", "heldout_nsamples", "bi_score")  # the identity has what came of them


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One field for each flag, by its name. reconstruct_step None is exact M; output_shrinkage None weighs all alike.

    dataset, dtype: None for the default. attn_ratio: of what is removed, as the flag.
    """

    model: str
    dataset: str | None
    seed: int
    prune: str
    allocation: str
    density: float
    attn_ratio: float | None
    rank_multiple: int
    reconstruct_step: int | None
    old_output_factor: float
    drift_factor: float
    output_shrinkage: float | None
    token_power: float
    ridge: float
    passes: int
    refine_steps: int
    profile_nsamples: int
    tune: int
    use_pifa: bool
    pruning_nsamples: int
    reconstruct_nsamples: int
    heldout_nsamples: int
    model_seq_len: int
    bi_score: str | None
    dtype: str | None

    @property
    def storage(self) -> StorageFormat:
        """The form that ranks are paid for in."""
        return PIVOTED if self.use_pifa else LOW_RANK

    @property
    def attention_density(self) -> float | None:
        return None if self.attn_ratio is None else 1 - self.attn_ratio

    @property
    def searches_attention(self) -> bool:
        """Whether the density of attention is left to held-out text."""
        return self.allocation == "type" and self.attn_ratio is None

    @property
    def judges(self) -> bool:
        """Whether something is chosen on held-out windows."""
        return bool(self.tune) or self.searches_attention or self.prune == AUTO

    def recipe(self) -> Recipe:
        """The constants that the flags ask for."""
        return Recipe(
            old_output_factor=self.old_output_factor,
            drift_factor=self.drift_factor,
            output_shrinkage=self.output_shrinkage,
            token_power=self.token_power,
            rank_floor=RANK_FLOOR,
            attention_density=self.attention_density,
        )

    def as_json(self) -> dict[str, Any]:
        """What a record says of the flags."""
        named = {name: value for name, value in asdict(self).items() if name not in UNNAMED}
        return {**named, "density_asked": self.density, "overall_ratio": round(1 - self.density, 12)}
