"""LoRA adapters on factors, by peft. peft is an extra: it is imported by the first call that needs it."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from torch import nn

from utils.errors import UsageError

REQUIREMENTS = "requirements-finetune.txt"


def check_installed(order: str) -> None:
    """Raises: UsageError with the command that installs peft."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"--order {order} needs peft: pip install -r {REQUIREMENTS}; --order full works without it")


def add_adapters(model: Any, names: Sequence[str], *, rank: int, alpha: float, dropout: float) -> nn.Module:
    """The model with W + alpha/rank B A in place of W for every nn.Linear of `names`; only A and B can be trained.

    B starts at zero, A at random, in the dtype of W or float32. The model itself is changed; `merge` gives it back.
    """
    import peft

    scale: Any = alpha  # annotated as int there, but only ever divided by the rank
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=list(names), bias="none"
    )
    return peft.get_peft_model(model, config)


def merge(adapted: Any) -> Any:
    """Add alpha/rank B A to W, in W's dtype, and take the adapters away: the model that `add_adapters` was given."""
    return adapted.merge_and_unload()
