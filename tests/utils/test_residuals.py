"""utils/residuals.py: who writes into the residual stream, in every family, by looking."""

import pytest

from tests import tiny
from utils.layers import describe_layers

PRE_NORM = {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}
WRITERS = {
    "llama": PRE_NORM,
    "llama-gqa": PRE_NORM,
    "mistral": PRE_NORM,
    "qwen2": PRE_NORM,
    "qwen3": PRE_NORM,
    "phi3": PRE_NORM,
    "gemma2": {},  # normalises before it adds
    "opt": {"self_attn.out_proj": "", "fc2": "final_layer_norm"},
}


@pytest.mark.parametrize("family", WRITERS)
def test_the_writers_of_every_family(family):
    for layer in describe_layers(tiny.build(family)):
        assert layer.residuals == WRITERS[family]
