"""Low-rank and pivoted linears for Hugging Face models. Importing it teaches transformers to load checkpoints."""

from component.format.integration import PIFAConfig
from component.format.linear import LowRankLinear, PIFALinear

__all__ = ["LowRankLinear", "PIFAConfig", "PIFALinear"]
