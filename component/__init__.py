"""Low-rank and pivoted linears for Hugging Face models. Importing it teaches transformers to load checkpoints."""

from component.integration import PIFAConfig
from component.linear import LowRankLinear, PIFALinear

__all__ = ["LowRankLinear", "PIFAConfig", "PIFALinear"]
