"""Compress Hugging Face models into low-rank and pivoted linears. Importing it teaches transformers the format.

Nothing heavy is imported before it is asked for: the names below on their first use, and the format as soon as
transformers is there to learn it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from utils.late_imports import once_imported

if TYPE_CHECKING:
    from component.api import compress_model, judge_model, pivot_model, plan_compression, save_model
    from component.format.integration import PIFAConfig
    from component.format.linear import LowRankLinear, PIFALinear

__all__ = [
    "LowRankLinear",
    "PIFAConfig",
    "PIFALinear",
    "compress_model",
    "judge_model",
    "pivot_model",
    "plan_compression",
    "save_model",
]

_HOME = {
    "LowRankLinear": "component.format.linear",
    "PIFAConfig": "component.format.integration",
    "PIFALinear": "component.format.linear",
    "compress_model": "component.api",
    "judge_model": "component.api",
    "pivot_model": "component.api",
    "plan_compression": "component.api",
    "save_model": "component.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


# every way to load a model goes through this module, and it has imported all that the format builds on
once_imported("transformers.modeling_utils", lambda: importlib.import_module("component.format.integration"))
