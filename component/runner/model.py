"""A lean LLaMA-like model for inference, built from the modules of a loaded transformers model.

Linears that share an input become one product (q, k, v and gate, up), pivots and dense rows stacked, with the few
coefficient products after it. Outputs stay in the order in which they are computed; the kernel that comes next reads
each from its place. The KV cache is static, and a decode step is one CUDA graph. Dense, low-rank, pivoted and narrower
linears run side by side, through the same kernels. Narrower values have zeros in the cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from component.runner.checks import PROBE, check_runnable, decoder_of, rotary_tables
from component.runner.layout import AttentionState, Layout, Scratch
from component.runner.ops import (
    add_and_norm,
    attention,
    decode_attention,
    fast_kernels,
    in_order,
    rotate_and_store,
    silu_product,
)
from component.runner.weights import Layer, Weights, stacked_weights
from utils.errors import UsageError

# logits of a short text against the model's own, relative
PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class LeanModel:
    """Runs what `from_transformers` read from a model. One rectangular batch at a time, no padding.

    The batch size of `decode` is that of the last `prefill`. eos: the tokens that end a text; pad: what follows them.
    """

    def __init__(self, weights: Weights, *, eos: list[int], pad: int | None):
        self.weights, self.eos, self.pad = weights, eos, pad
        keys = weights.layers[0].cache[0]
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
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LeanModel":
        """Read a LLaMA-like causal model; its parameters become views of this one's.

        The model is moved to `device` and `dtype` where they are given. A short text is run through both, so a model
        that looks the same but computes something else is noticed.

        Raises: UsageError that says what this runner does not do.
        """
        if device is not None or dtype is not None:
            model.to(device=device, dtype=dtype)
        model.eval()
        decoder = decoder_of(model)
        check_runnable(decoder, model.config, max_length)
        embedding = decoder.embed_tokens.weight
        probe = _probe(len(embedding), min(PROBE, max_length)).to(embedding.device)
        settings = getattr(model, "generation_config", None) or model.config
        eos = settings.eos_token_id
        with torch.no_grad():
            rotary = rotary_tables(decoder, max_length)
            expected = model(probe, use_cache=False).logits.float()
            weights = stacked_weights(model, decoder, rotary, max_batch=max_batch, max_length=max_length)
            lean = cls(
                weights,
                eos=[] if eos is None else [eos] if isinstance(eos, int) else list(eos),
                pad=settings.pad_token_id,
            )
            logits = lean.prefill(probe, every_position=True)
        error = ((logits.float() - expected).norm() / expected.norm()).item()
        if not error < PROBE_TOLERANCE[logits.dtype]:
            raise UsageError(
                f"{type(model).__name__} is built like a LLaMA but computes something else: "
                f"logits differ by {error:.1e} of their norm"
            )
        return lean

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
        if not (self.weights.embedding.is_cuda and fast_kernels(self.weights.embedding)):
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
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        seen: Callable[[Tensor], None] = lambda column: None,
    ) -> Tensor:
        """tokens: (batch, length) -> (batch, up to length + max_new_tokens), as transformers' generate.

        Greedy at temperature 0. A sequence that has met an end-of-text token goes on with padding; all having met
        one ends it. seen: is called with each column of new tokens, (batch, 1), as it comes.
        """
        if tokens.shape[1] + max_new_tokens > self.max_length:
            raise UsageError(f"{tokens.shape[1]} + {max_new_tokens} tokens do not fit the cache of {self.max_length}")
        ends = torch.tensor(self.eos, dtype=tokens.dtype, device=tokens.device)
        pad = self.pad if self.pad is not None else self.eos[0] if self.eos else 0
        going = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        result = [tokens]
        for step in range(max_new_tokens):
            logits = self.prefill(tokens) if step == 0 else self.decode(result[-1])
            new = _draw(logits, temperature, generator).to(tokens.dtype)
            result.append(torch.where(going, new, pad)[:, None])
            seen(result[-1])
            if self.eos:
                going &= ~torch.isin(new, ends)
                if not going.any():
                    break
        return torch.cat(result, dim=1)

    def _forward(self, tokens: Tensor, every_position: bool) -> Tensor:
        """Logits of the last position, (batch, vocabulary), or of every one, (batch, length, vocabulary)."""
        batch, length = tokens.shape
        weights, scratch = self.weights, self.scratch
        hidden = weights.embedding[tokens.flatten()]  # (batch * length, d)
        update: tuple[Tensor, Layout] | None = None
        for layer in weights.layers:
            hidden, x = add_and_norm(hidden, update, layer.before_attention, eps=weights.eps)
            y = self._attention(layer, layer.qkv(x, scratch), batch, length=length)
            update = layer.o(y, scratch), layer.o.layout
            hidden, x = add_and_norm(hidden, update, layer.before_mlp, eps=weights.eps)
            y = silu_product(layer.gate_up(x, scratch), layer.gate_up.layout)
            update = layer.down(y, scratch), layer.down.layout
        assert update is not None
        if not every_position and length > 1:
            last = slice(length - 1, None, length)
            hidden, update = hidden[last].contiguous(), (update[0][last], update[1])
        _, x = add_and_norm(hidden, update, weights.norm, eps=weights.eps)
        logits = in_order(weights.head(x, scratch), weights.head.layout)
        return logits.view(batch, length, -1) if every_position else logits

    def _attention(self, layer: Layer, z: Tensor, batch: int, *, length: int) -> Tensor:
        """z: (batch * length, width) of q, k and v -> (batch * length, queries * size); the cache takes k and v."""
        keys, values = layer.cache[0][:batch], layer.cache[1][:batch]
        state = AttentionState(
            heads=layer.heads,
            rotary=self.weights.rotary,
            position=self.position,
            cache=(keys, values),
            scale=self.weights.scale,
        )
        if length == 1:
            return decode_attention(z, layer.qkv.layout, state, scratch=self.scratch)
        q = rotate_and_store(z, layer.qkv.layout, state)
        return attention(q, (keys[:, :, :length], values[:, :, :length]), scale=state.scale, causal=True)

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


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
