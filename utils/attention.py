"""Attention for grouped heads in float32 on a GPU, where torch has no fast kernel that takes them as they are."""

from typing import Any, NamedTuple

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "sdpa_repeated_heads"


class _Ungrouped(NamedTuple):
    """What SDPA looks at of an attention module, and nothing that says how its heads are grouped."""

    is_causal: bool


def repeat_heads(model: PreTrainedModel) -> None:
    """Let a model that attends through torch's SDPA hand it as many key and value heads as query heads.

    With fewer, SDPA on a GPU takes FlashAttention, which has no float32, or else multiplies out every score. Copies
    of the heads cost little beside that. Models that attend otherwise, and transformers too old to be told, are left
    alone.
    """
    attention: Any = getattr(transformers, "AttentionInterface", None)
    mask: Any = getattr(transformers, "AttentionMaskInterface", None)
    if attention and mask and model.config._attn_implementation == "sdpa":
        attention.register(NAME, _attend)
        mask.register(NAME, mask()["sdpa"])
        model.set_attn_implementation(NAME)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    ungrouped: Any = _Ungrouped(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(ungrouped, query, key, value, attention_mask, **kwargs)
