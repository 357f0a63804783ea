"""utils/attention.py: the same attention with the heads repeated."""

import pytest
import torch

from tests import tiny
from utils.attention import NAME, repeat_heads


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_stay_and_so_does_what_is_saved(family):
    model, windows = tiny.build(family, attention="sdpa" if family != "gemma2" else None), tiny.token_windows(2, 16)
    before, config = model(windows).logits, model.config.to_json_string()
    repeat_heads(model)
    assert torch.allclose(model(windows).logits, before, atol=1e-5)
    assert model.config.to_json_string() == config


def test_only_sdpa_is_replaced():
    eager, sdpa = tiny.build(attention="eager"), tiny.build(attention="sdpa")
    repeat_heads(eager)
    repeat_heads(sdpa)
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", NAME)
