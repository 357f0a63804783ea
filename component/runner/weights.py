"""The weights of a LLaMA-like model as the runner reads them: each layer's linears as four stacks, norms, head."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from component.runner.checks import eps_of
from component.runner.layout import Heads
from component.runner.stack import Stack


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer: its two norms, its four stacks and its part of the cache."""

    before_attention: Tensor
    qkv: Stack
    o: Stack
    before_mlp: Tensor
    gate_up: Stack
    down: Stack
    heads: Heads
    cache: tuple[Tensor, Tensor]  # keys, values: (max_batch, key heads, max_length, head size)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """All that a model computes with. rotary: cos and sin, (max_length, head size), float32."""

    embedding: Tensor  # (vocabulary, d)
    layers: list[Layer]
    norm: Tensor
    head: Stack
    eps: float  # of every norm
    scale: float  # of a query times a key
    rotary: tuple[Tensor, Tensor]


def stacked_weights(
    model: Any, decoder: Any, rotary: tuple[Tensor, Tensor], *, max_batch: int, max_length: int
) -> Weights:
    """A checked model's weights with an empty cache; its parameters become views of these."""
    embedding = decoder.embed_tokens.weight.detach()
    first = decoder.layers[0]
    eps = eps_of(first.input_layernorm)
    layers = []
    for layer in decoder.layers:
        a, m = layer.self_attn, layer.mlp
        heads = _heads(a, eps)
        cache = embedding.new_zeros(2, max_batch, heads.keys, max_length, heads.size)
        layers.append(
            Layer(
                before_attention=layer.input_layernorm.weight.detach(),
                qkv=Stack([a.q_proj, a.k_proj, a.v_proj]),
                o=Stack([a.o_proj]),
                before_mlp=layer.post_attention_layernorm.weight.detach(),
                gate_up=Stack([m.gate_proj, m.up_proj]),
                down=Stack([m.down_proj]),
                heads=heads,
                cache=(cache[0], cache[1]),
            )
        )
    return Weights(
        embedding=embedding,
        layers=layers,
        norm=decoder.norm.weight.detach(),
        head=Stack([model.lm_head]),
        eps=eps,
        scale=first.self_attn.scaling,
        rotary=rotary,
    )


def _heads(attention: Any, eps: float) -> Heads:
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    query_norm, key_norm = (None if norm is None else norm.weight.detach() for norm in norms)
    size = attention.head_dim
    return Heads(
        queries=attention.q_proj.out_features // size,
        keys=attention.k_proj.out_features // size,
        size=size,
        query_norm=query_norm,
        key_norm=key_norm,
        eps=eps,
    )
