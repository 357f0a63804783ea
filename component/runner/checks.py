"""Whether a model is one that the runner can run: its modules, their settings, its rotary angles."""

from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UsageError

PROBE = 8  # tokens of a short text
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def decoder_of(model: Any) -> Any:
    """What `model` decodes with. Raises: UsageError where the model's parts are not a LLaMA's."""
    decoder: Any = getattr(model, "model", None)
    parts = {name for name, _ in decoder.named_children()} if isinstance(decoder, nn.Module) else set()
    if parts != {"embed_tokens", "layers", "norm", "rotary_emb"} or not hasattr(model, "lm_head"):
        raise UsageError(f"{type(model).__name__} is not built like a LLaMA: embed_tokens, layers, norm, lm_head")
    return decoder


def check_runnable(decoder: Any, config: Any, max_length: int) -> None:
    """Raises: UsageError that says what this runner does not do, of texts of up to max_length tokens."""
    _check_config(config, max_length)
    for layer in decoder.layers:
        _check_layer(layer)
    _check_alike(decoder)


def _check_layer(layer: Any) -> None:
    attention = _children(layer, LAYER, "decoder layer")["self_attn"]
    extra = {name for name, _ in attention.named_children()} & HEAD_NORMS
    _children(attention, ATTENTION | (HEAD_NORMS if extra else set()), "attention")
    mlp = _children(layer.mlp, MLP | {"act_fn"}, "MLP")
    probe = torch.linspace(-4, 4, 9)
    if not torch.allclose(mlp["act_fn"](probe), nn.functional.silu(probe), atol=1e-6):
        raise UsageError("its MLP uses another activation than SiLU")
    for norm in ("q_norm", "k_norm"):
        if norm in extra and len(getattr(attention, norm).weight) != attention.head_dim:
            raise UsageError(f"its {norm} is not over one head")


def _check_alike(decoder: Any) -> None:
    """What the runner holds once must be the same in every layer."""
    attentions = [layer.self_attn for layer in decoder.layers]
    norms = [norm for layer in decoder.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms += [getattr(attention, name) for attention in attentions for name in HEAD_NORMS if hasattr(attention, name)]
    if len({eps_of(norm) for norm in [*norms, decoder.norm]}) > 1:
        raise UsageError("its norms use several epsilons")
    if len({(attention.scaling, attention.head_dim) for attention in attentions}) > 1:
        raise UsageError("its layers have attention heads of several kinds")


def _children(module: nn.Module, names: set[str], what: str) -> dict[str, Any]:
    children = {name: child for name, child in module.named_children() if not isinstance(child, nn.Identity)}
    if set(children) != names:
        raise UsageError(f"its {what} is made of {', '.join(sorted(children))}, not of {', '.join(sorted(names))}")
    return children


def _check_config(config: Any, max_length: int) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and max_length > window:
        raise UsageError(f"its sliding window of {window} is shorter than max_length {max_length}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise UsageError(f"its scores are capped ({name}), which this runner does not do")


def eps_of(norm: Any) -> float:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if eps is None:
        raise UsageError(f"{type(norm).__name__} tells no epsilon")
    return eps


def rotary_tables(decoder: Any, max_length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, as the model's own module gives them: (max_length, head size), float32.

    Raises: UsageError where they depend on the length of the text, or turn only a part of each head.
    """
    device = decoder.embed_tokens.weight.device
    places = torch.arange(max_length, device=device)[None]
    reference = torch.zeros(1, dtype=torch.float32, device=device)
    near = decoder.rotary_emb(reference, places[:, :PROBE])
    tables = decoder.rotary_emb(reference, places)
    if any(not torch.equal(a[0], b[0, :PROBE]) for a, b in zip(near, tables, strict=True)):
        raise UsageError("its rotary angles depend on the length of the text, which this runner does not do")
    cos, sin = (table[0].contiguous() for table in tables)
    if cos.shape[1] != decoder.layers[0].self_attn.head_dim:
        raise UsageError("its rotary embedding turns only a part of each head, which this runner does not do")
    return cos, sin
