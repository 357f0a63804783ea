"""A whole model, run by transformers and by the lean runner: prefill, decoding, memory."""

import gc
import inspect
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from component.bench import timing
from component.bench.block import KINDS, random_linear
from component.bench.layer import Shape
from component.runner.model import LeanModel
from utils import models
from utils.errors import UsageError
from utils.junctions import Skeleton
from utils.layers import decoder_layers
from utils.report import GIB

ROUNDS = 3  # of every long call, and of a row of decode steps; the median is taken


class Load(NamedTuple):
    """What is asked of a model."""

    prefill: tuple[int, int]  # batch, length
    prompt: int  # tokens before decoding starts, and of the time to the first token
    batches: tuple[int, ...]  # decoded
    steps: int  # decoded in a row


LOADS = {
    "cuda": Load(prefill=(8, 2048), prompt=512, batches=(1, 32), steps=8),
    "cpu": Load(prefill=(1, 64), prompt=16, batches=(1, 4), steps=4),
}
Model = Any  # transformers' causal models, as their library types them
Runner = Any  # prefill(tokens: (batch, length)) and decode(tokens: (batch,)), both to logits: (batch, vocabulary)
Start = Callable[[int, int], Runner]  # of a batch and a length up to which it will be used


def random_model(
    config: transformers.PretrainedConfig, kind: str, density: float, *, dtype: torch.dtype, device: torch.device
) -> Model:
    """A model of this config on the device, its decoder linears of one of KINDS, with random weights.

    In a folded one, linears that go on to another channel by channel need no reorder.
    """
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, **models.dtype_argument(dtype))
    model.eval().requires_grad_(False)
    if kind == KINDS[0]:
        return model
    skeleton = Skeleton(config) if kind.endswith("folded") else None
    for name, layer in decoder_layers(model):
        linears = {f"{name}.{place}": m for place, m in layer.named_modules() if isinstance(m, nn.Linear)}
        probe = skeleton.probe_of(linears) if skeleton else None
        in_order = {producer for junction in (probe.junctions if probe else ()) for producer in junction.producers}
        for full, linear in linears.items():
            shape = Shape.at_density(linear.out_features, linear.in_features, density)
            own = kind if full in in_order or not skeleton else KINDS[2]
            new = random_linear(own, shape, dtype=dtype, device=device)
            if linear.bias is not None:
                new.bias = linear.bias
            model.set_submodule(full, new)
    return model


def measure_model(name: str, model: Model, load: Load, *, device: torch.device) -> list[dict[str, Any]]:
    """One result for transformers, one for the lean runner; `refused` where that can't run the model.

    The model is in eval mode on the device. Times are medians; a step of decoding follows a prompt.
    """
    size = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    results = []
    for runner, start in (
        ("transformers", partial(_Eager, model)),
        ("lean runner", partial(_Lean, model, device=device)),
    ):
        result = {"row": name, "runner": runner, "weights_gib": size / GIB}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            numbers = _measure(start, load, model.config.vocab_size, device=device)
        except UsageError as error:
            results.append({**result, "refused": str(error)})
            continue
        peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
        results.append({**result, **numbers, "peak_gib": peak})
    return results


class _Eager:
    """transformers as it comes: one launch after another, a cache that grows."""

    def __init__(self, model: Model, max_batch: int, max_length: int):
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        parameters = inspect.signature(self.decoder.forward).parameters
        self.keyword = "cache" if "cache" in parameters else "past_key_values"  # its name has changed in 5.x
        self.cache = transformers.DynamicCache()

    def prefill(self, tokens: Tensor) -> Tensor:
        self.cache = transformers.DynamicCache()
        return self._last_logits(tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        return self._last_logits(tokens[:, None])

    def _last_logits(self, tokens: Tensor) -> Tensor:
        states = self.decoder(tokens, use_cache=True, **{self.keyword: self.cache}).last_hidden_state
        return self.head(states[:, -1])


class _Lean:
    def __init__(self, model: Model, max_batch: int, max_length: int, *, device: torch.device):
        runner = LeanModel.from_transformers(model, max_batch=max_batch, max_length=max_length, device=device)
        self.prefill, self.decode = runner.prefill, runner.decode


@torch.no_grad()
def _measure(start: Start, load: Load, vocabulary: int, *, device: torch.device) -> dict[str, float]:
    """One runner after another, each freed before the next: its cache may be large."""
    measured = _prefill(start(*load.prefill), load, vocabulary, device=device)
    for batch in load.batches:
        _free(device)
        runner = start(batch, load.prompt + (1 + ROUNDS) * load.steps)
        decoded = _decode(runner, load, vocabulary, batch=batch, device=device)
        measured |= {f"{key}_{batch}": value for key, value in decoded.items()}
        del runner
    _free(device)
    return measured


def _prefill(runner: Runner, load: Load, vocabulary: int, *, device: torch.device) -> dict[str, float]:
    batch, length = load.prefill
    tokens = torch.randint(vocabulary, (batch, length), device=device)
    seconds = _typical(partial(runner.prefill, tokens), device)
    # without a cache, every new token takes the whole text again
    return {"prefill_tokens_s": batch * length / seconds, "tokens_s_without_cache": batch / seconds}


def _decode(runner: Runner, load: Load, vocabulary: int, *, batch: int, device: torch.device) -> dict[str, float]:
    tokens = torch.randint(vocabulary, (batch, load.prompt), device=device)
    first = _typical(lambda: runner.prefill(tokens).argmax(-1), device)

    def decode() -> None:
        """As a server does: no step waits for the host to have seen the one before."""
        for _ in range(load.steps):
            runner.decode(tokens[:, 0])

    seconds = _typical(decode, device) / load.steps
    return {"first_token_ms": 1e3 * first, "decode_ms": 1e3 * seconds, "tokens_s": batch / seconds}


def _typical(call: timing.Call, device: torch.device) -> float:
    call()
    return statistics.median(timing.timed(call, device) for _ in range(ROUNDS))


def _free(device: torch.device) -> None:
    """Give back what dropped models held on the card, cycles of objects included."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def measure_variants(
    variants: Sequence[tuple[str, Callable[[], Model]]], load: Load, device: torch.device
) -> list[dict[str, Any]]:
    """Build, measure and drop one model after the other: together they may not fit."""
    results = []
    for name, build in variants:
        results += measure_model(name, build(), load, device=device)
        _free(device)
    return results
