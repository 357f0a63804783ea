"""From Python, without a command line: compress a model that is in memory, pivot it, judge it, save it."""

from component.api.compressing import compress_model, plan_compression
from component.api.judging import judge_model
from component.api.pivoting import pivot_model
from component.api.saving import save_model

__all__ = ["compress_model", "judge_model", "pivot_model", "plan_compression", "save_model"]
