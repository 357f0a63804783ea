"""A lean LLaMA-like model for inference, built from the modules of a loaded transformers model.

Linears that share an input become one product (q, k, v and gate, up), pivots and dense rows stacked, with the few
coefficient products after it. Outputs stay in the order in which they are computed; the kernel that comes next reads
each from its place. The KV cache is static, and a decode step is one CUDA graph. Dense, low-rank, pivoted and narrower
linears run side by side, through the same kernels. Narrower values have zeros in the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from component.runner import ops as kernels
from component.runner.ops import Heads, Layout, Scratch
from component.runner.stack import Stack
from utils.errors import UsageError

PROBE = 8  # tokens that are run through both models
PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj"}


@dataclass
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


class LeanModel:
    """Runs what `from_transformers` read from a model. One rectangular batch at a time, no padding.

    The batch size of `decode` is that of the last `prefill`.
    """

    def __init__(self, embedding: Tensor, layers: list[Layer], norm: Tensor, head: Stack, eps: float, scale: float,
                 rotary: tuple[Tensor, Tensor], eos: list[int], pad: int | None):  # fmt: skip
        self.embedding, self.layers, self.norm, self.head = embedding, layers, norm, head
        self.eps, self.scale, self.rotary = eps, scale, rotary
        self.eos, self.pad = eos, pad
        keys = layers[0].cache[0]
        self.max_batch, self.max_length = keys.shape[0], keys.shape[2]
        self.position = torch.zeros(1, dtype=torch.int64, device=keys.device)
        self.scratch = Scratch.on(keys.device)
        self._batch = self._filled = 0
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    @classmethod
    def from_transformers(
        cls,
        model: Any,
        max_batch: int = 1,
        max_length: int = 2048,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LeanModel":
        """Read a LLaMA-like causal model; its parameters become views of this one's.

        The model is moved to `device` and `dtype` where they are given. A short text is run through both, so a model
        that looks the same but computes something else is found out.

        Raises: UsageError that says what this runner does not do.
        """
        if device is not None or dtype is not None:
            model.to(device=device, dtype=dtype)
        model.eval()
        decoder, layers = _decoder(model)
        _check_config(model.config, max_length)
        for layer in layers:
            _check_layer(layer)
        _check_alike(decoder)
        embedding = decoder.embed_tokens.weight
        probe = _probe(len(embedding), min(PROBE, max_length)).to(embedding.device)
        with torch.no_grad():
            rotary = _rotary(decoder, max_length)
            expected = model(probe, use_cache=False).logits.float()
            lean = cls._build(model, decoder, layers, rotary, max_batch, max_length)
            found = lean.prefill(probe, every_position=True)
        error = ((found.float() - expected).norm() / expected.norm()).item()
        if not error < PROBE_TOLERANCE[found.dtype]:
            raise UsageError(
                f"{type(model).__name__} is built like a LLaMA but computes something else: "
                f"logits differ by {error:.1e} of their norm"
            )
        return lean

    @classmethod
    def _build(
        cls, model: Any, decoder: Any, layers: Any, rotary: tuple[Tensor, Tensor], max_batch: int, max_length: int
    ) -> "LeanModel":
        embedding = decoder.embed_tokens.weight.detach()
        attention = layers[0].self_attn
        eps = _eps(layers[0].input_layernorm)
        built = []
        for layer in layers:
            a, m = layer.self_attn, layer.mlp
            heads = _heads(a, eps)
            cache = embedding.new_zeros(2, max_batch, heads.keys, max_length, heads.size)
            built.append(
                Layer(
                    layer.input_layernorm.weight.detach(),
                    Stack([a.q_proj, a.k_proj, a.v_proj]),
                    Stack([a.o_proj]),
                    layer.post_attention_layernorm.weight.detach(),
                    Stack([m.gate_proj, m.up_proj]),
                    Stack([m.down_proj]),
                    heads,
                    (cache[0], cache[1]),
                )
            )
        settings = getattr(model, "generation_config", None) or model.config
        eos = settings.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        return cls(
            embedding, built, decoder.norm.weight.detach(), Stack([model.lm_head]), eps, attention.scaling,
            rotary, eos, settings.pad_token_id,
        )  # fmt: skip

    @torch.no_grad()
    def prefill(self, tokens: Tensor, every_position: bool = False) -> Tensor:
        """Start anew with tokens: (batch, length). Logits of the last position, (batch, vocab), or of every one."""
        batch, length = tokens.shape
        if batch > self.max_batch or length > self.max_length:
            raise UsageError(f"{batch} x {length} tokens do not fit the cache of {self.max_batch} x {self.max_length}")
        self.position.zero_()
        logits = self._forward(tokens, every_position)
        self.position.fill_(length)
        self._batch, self._filled = batch, length
        return logits

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """One more token for each sequence: (batch,) or (batch, 1). Returns logits, (batch, vocab).

        On a GPU the step is captured at its first use, and its logits are overwritten by the next call.
        """
        if len(tokens) != self._batch:
            raise UsageError(f"decode goes on with the {self._batch} sequences of the last prefill, not {len(tokens)}")
        if self._filled == self.max_length:
            raise UsageError(f"the cache is full: {self.max_length} tokens")
        self._filled += 1
        if not (self.embedding.is_cuda and kernels.fast_kernels(self.embedding)):
            return self._step(tokens.view(-1, 1))
        if self._batch not in self._graphs:
            self._graphs[self._batch] = self._capture(tokens)
        graph, inputs, logits = self._graphs[self._batch]
        inputs.copy_(tokens.view(-1, 1))
        graph.replay()
        return logits

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        seen: Callable[[Tensor], None] = lambda column: None,
    ) -> Tensor:
        """tokens: (batch, length) -> (batch, up to length + max_new_tokens), as transformers' generate.

        Greedy at temperature 0. A sequence that has met an end-of-text token goes on with padding; all having met
        one ends it. seen: is given each column of new tokens, (batch, 1), as it is found.
        """
        if tokens.shape[1] + max_new_tokens > self.max_length:
            raise UsageError(f"{tokens.shape[1]} + {max_new_tokens} tokens do not fit the cache of {self.max_length}")
        ends = torch.tensor(self.eos, dtype=tokens.dtype, device=tokens.device)
        pad = self.pad if self.pad is not None else self.eos[0] if self.eos else 0
        going = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        result = [tokens]
        for step in range(max_new_tokens):
            logits = self.prefill(tokens) if step == 0 else self.decode(result[-1])
            chosen = _choose(logits, temperature, generator).to(tokens.dtype)
            result.append(torch.where(going, chosen, pad)[:, None])
            seen(result[-1])
            if self.eos:
                going &= ~torch.isin(chosen, ends)
                if not going.any():
                    break
        return torch.cat(result, dim=1)

    def _forward(self, tokens: Tensor, every_position: bool) -> Tensor:
        batch, length = tokens.shape
        scratch = self.scratch
        hidden = self.embedding[tokens.flatten()]  # (batch * length, d)
        update: tuple[Tensor, Layout] | None = None
        for layer in self.layers:
            hidden, x = kernels.add_and_norm(hidden, update, layer.before_attention, self.eps)
            cache = layer.cache[0][:batch], layer.cache[1][:batch]
            z = layer.qkv(x, scratch)
            ready = z, layer.qkv.layout, layer.heads, self.rotary, self.position, cache
            if length == 1:
                y = kernels.decode_attention(*ready, self.scale, scratch)
            else:
                q = kernels.rotate_and_store(*ready)
                y = kernels.attention(q, tuple(part[:, :, :length] for part in cache), self.scale, causal=True)
            update = layer.o(y, scratch), layer.o.layout
            hidden, x = kernels.add_and_norm(hidden, update, layer.before_mlp, self.eps)
            y = kernels.silu_product(layer.gate_up(x, scratch), layer.gate_up.layout)
            update = layer.down(y, scratch), layer.down.layout
        assert update is not None
        if not every_position and length > 1:
            last = slice(length - 1, None, length)
            hidden, update = hidden[last].contiguous(), (update[0][last], update[1])
        _, x = kernels.add_and_norm(hidden, update, self.norm, self.eps)
        logits = kernels.in_order(self.head(x, scratch), self.head.layout)
        return logits.view(batch, length, -1) if every_position else logits

    def _step(self, tokens: Tensor) -> Tensor:
        logits = self._forward(tokens, every_position=False)
        self.position.add_(1)
        return logits

    def _capture(self, tokens: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """A step writes the same cache slots however often it runs, so warming up only moves the position."""
        inputs = tokens.view(-1, 1).clone()
        before = self.position.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(inputs)
                self.position.copy_(before)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step(inputs)
        return graph, inputs, logits


def _probe(vocabulary: int, length: int) -> Tensor:
    """Words from all over the vocabulary: (1, length) int64. Its first ones are marks that a model has hardly seen, and
    what it makes of them is mostly rounding in bfloat16.
    """
    return (torch.arange(1, length + 1) * (vocabulary // (length + 1)))[None]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]


def _heads(attention: Any, eps: float) -> Heads:
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    query_norm, key_norm = (None if norm is None else norm.weight.detach() for norm in norms)
    size = attention.head_dim
    queries, keys = attention.q_proj.out_features // size, attention.k_proj.out_features // size
    return Heads(queries, keys, size, query_norm, key_norm, eps)


# ---------------------------------------------------------------- is it a model that this runner can run


def _decoder(model: Any) -> tuple[Any, Any]:
    decoder: Any = getattr(model, "model", None)
    parts = {name for name, _ in decoder.named_children()} if isinstance(decoder, nn.Module) else set()
    if parts != {"embed_tokens", "layers", "norm", "rotary_emb"} or not hasattr(model, "lm_head"):
        raise UsageError(f"{type(model).__name__} is not built like a LLaMA: embed_tokens, layers, norm, lm_head")
    return decoder, decoder.layers


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
    if len({_eps(norm) for norm in [*norms, decoder.norm]}) > 1:
        raise UsageError("its norms use several epsilons")
    if len({(attention.scaling, attention.head_dim) for attention in attentions}) > 1:
        raise UsageError("its layers have attention heads of several kinds")


def _children(module: nn.Module, names: set[str], what: str) -> dict[str, Any]:
    found = {name: child for name, child in module.named_children() if not isinstance(child, nn.Identity)}
    if set(found) != names:
        raise UsageError(f"its {what} is made of {', '.join(sorted(found))}, not of {', '.join(sorted(names))}")
    return found


def _check_config(config: Any, max_length: int) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and max_length > window:
        raise UsageError(f"its sliding window of {window} is shorter than max_length {max_length}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise UsageError(f"its scores are capped ({name}), which this runner does not do")


def _eps(norm: Any) -> float:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if eps is None:
        raise UsageError(f"{type(norm).__name__} tells no epsilon")
    return eps


def _rotary(decoder: Any, max_length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, as the model's own module gives them: (max_length, head size), float32."""
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
