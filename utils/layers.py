"""Find a model's decoder layers, what they are given, and in each the linears that receive the same input."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from utils.errors import UsageError
from utils.placement import Empty
from utils.residuals import residual_writers

PROBE_LENGTH = 8  # tokens of the forward pass that shows which linears share an input
CPU = torch.device("cpu")
LAYERS_RETURN_TENSORS = int(transformers.__version__.split(".")[0]) >= 5


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer: its full name, and groups of linears that share an input, in call order.

    Names in `groups` are relative to the layer; `attention` holds those of the attention block; `residuals` says of
    those that write into the residual stream where it can be seen (residuals.py).
    """

    name: str
    groups: tuple[tuple[str, ...], ...]
    attention: frozenset[str]
    residuals: Mapping[str, str] = field(default_factory=dict)

    def linears(self) -> list[str]:
        return [name for group in self.groups for name in group]


class LayerSource(Protocol):
    """Where the drivers get a model's decoder layers from."""

    def filled(self, name: str, device: torch.device) -> contextlib.AbstractContextManager[nn.Module]:
        """The layer of this full name, on the device while the block runs."""


class HeldLayers:
    """Of a model that is in memory whole; layers come from the CPU and go back to it."""

    def __init__(self, model: PreTrainedModel):
        self._model = model

    @contextlib.contextmanager
    def filled(self, name: str, device: torch.device) -> Iterator[nn.Module]:
        layer = self._model.get_submodule(name).to(device)
        try:
            yield layer
        finally:
            layer.to(CPU)


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """(name, module) of each decoder layer: the longest ModuleList of the decoder that holds linears.

    Raises: UsageError where there is none.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(module is inner for inner in decoder.modules())
        and any(isinstance(inner, nn.Linear) for inner in module.modules())
    ]
    if not lists:
        raise UsageError(f"{type(model).__name__} has no decoder layers with linears: nothing to compress")
    name, layers = max(lists, key=lambda item: len(item[1]))
    return [(f"{name}.{index}", layer) for index, layer in enumerate(layers)]


@contextlib.contextmanager
def _stubbed(layers: list[nn.Module], instead: Callable[[int, Tensor, dict], Tensor]) -> Iterator[None]:
    """Let all but the layers run: embeddings, masks, position encodings, head. `instead` gives a layer's output."""

    def stub(index: int):
        def forward(hidden_states, *args, **kwargs):
            output = instead(index, hidden_states, kwargs)
            return output if LAYERS_RETURN_TENSORS else (output,)

        return forward

    for index, layer in enumerate(layers):
        layer.forward = stub(index)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@torch.no_grad()
def layer_inputs(
    model: PreTrainedModel, windows: Tensor, room: Callable[[int], Empty] | None = None
) -> tuple[Tensor, list[dict[str, Any]]]:
    """What the decoder layers are given: hidden states (windows, length, width), and keyword arguments per layer.

    windows: (count, length) int64. room: gives, for the size of the hidden states in bytes, how to make the tensor that
    holds them; left out, they are in memory. Keywords are taken from one window: all have the same length and no
    padding, so masks and position encodings of batch 1 hold for any batch. They differ by layer in some families.
    """
    layers = [layer for _, layer in decoder_layers(model)]
    hidden: list[Tensor] = []  # of all windows, once the shape is known
    keywords: list[dict[str, Any]] = [{} for _ in layers]
    numbers = itertools.count()

    def record(index: int, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if index == 0:
            if not hidden:
                shape = len(windows), *states.shape[1:]
                empty = room(len(windows) * states.nbytes) if room else None
                hidden.append(empty(shape, states.dtype) if empty else states.new_empty(shape))
            hidden[0][next(numbers)].copy_(states[0])
        keywords[index] = {key: value for key, value in kwargs.items() if value is not None}
        # what comes after the layers is not looked at: let it have one token
        return states if index + 1 < len(layers) else states[:, :1]

    embeddings: Any = model.get_input_embeddings()
    place = embeddings.weight.device
    with _stubbed(layers, record):
        for window in windows:
            # no cache: replayed keywords would append to it
            model.get_decoder()(input_ids=window[None].to(place), use_cache=False)
    return hidden[0], keywords


def logits_from(model: PreTrainedModel, window: Tensor, hidden: Tensor) -> Tensor:
    """The model's logits if its last layer had returned `hidden`: norm and head run, the layers do not.

    window: (1, length) int64; hidden: (1, length, width). Returns (1, length, vocabulary).
    """
    layers = [layer for _, layer in decoder_layers(model)]
    with _stubbed(layers, lambda _index, _states, _kwargs: hidden):
        return model(input_ids=window, use_cache=False).logits


@contextlib.contextmanager
def rest_on(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Embeddings, norm and head on the device, in float32; the layers stay where they are."""
    inside = {id(t) for _, layer in decoder_layers(model) for t in (*layer.parameters(), *layer.buffers())}
    rest = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside]
    before = [t.data for t in rest]
    for tensor in rest:
        tensor.data = tensor.data.to(device, torch.float32 if tensor.is_floating_point() else None)
    try:
        yield
    finally:
        for tensor, data in zip(rest, before, strict=True):
            tensor.data = data


def run_layer(layer: nn.Module, hidden: Tensor, keywords: dict[str, Any]) -> Tensor:
    """One layer's output hidden states, whether it returns a tensor or a tuple."""
    output = layer(hidden, **keywords)
    return output[0] if isinstance(output, (tuple, list)) else output


def advance(layer: nn.Module, states: Tensor, kwargs: dict[str, Any], *, batch: int) -> None:
    """Replace hidden states by the layer's outputs, so many windows at a time, in place."""
    device = next(layer.parameters()).device
    for part in states.split(batch):
        part.copy_(run_layer(layer, part.to(device), kwargs))


@contextlib.contextmanager
def watching(layer: nn.Module, names: Iterable[str], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """While the block runs, see(name, input, output) is called after every call of the named linears of the layer."""

    def hook_of(name: str):
        return lambda _module, args, output: see(name, args[0], output)

    handles = [layer.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def describe_layers(model: PreTrainedModel, source: LayerSource | None = None) -> list[DecoderLayer]:
    """Find every layer's groups by one short forward pass, watching which linears receive the same tensor.

    source: of the layers, where the model does not hold them.

    Raises: UsageError where a layer calls no linear at all.
    """
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    probe = torch.arange(PROBE_LENGTH)[None] % vocabulary
    hidden, keywords = layer_inputs(model, probe)
    described = []
    for (name, _), kwargs in zip(decoder_layers(model), keywords, strict=True):
        with (source or HeldLayers(model)).filled(name, hidden.device) as layer:
            groups = _shared_inputs(layer, hidden, kwargs)
            if not groups:
                raise UsageError(f"{name} calls no linear: nothing to compress")
            # attention is what the layer calls first: every linear below the same child as the first one called
            first_child = groups[0][0].split(".")[0]
            linears = [linear for group in groups for linear in group]
            attention = frozenset(linear for linear in linears if linear.split(".")[0] == first_child)
            writers = residual_writers(
                layer, hidden, output_of=lambda module, kw=kwargs: run_layer(module, hidden, kw), linears=linears
            )
        described.append(DecoderLayer(name=name, groups=groups, attention=attention, residuals=writers))
    return described


@torch.no_grad()
def _shared_inputs(layer: nn.Module, hidden: Tensor, keywords: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    calls: dict[str, Tensor] = {}  # holding each input keeps its memory from being used again for another

    def see(name: str, x: Tensor, _y: Tensor) -> None:
        calls.setdefault(name, x)

    linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    with watching(layer, linears, see):
        run_layer(layer, hidden, keywords)
    groups: dict[tuple[int, int], list[str]] = {}
    for name, tensor in calls.items():
        groups.setdefault((tensor.data_ptr(), tensor.shape[-1]), []).append(name)
    return tuple(tuple(group) for group in groups.values())


def uncalled_linears(layer: nn.Module, described: DecoderLayer) -> list[str]:
    """Linears of the layer that the probe never reached; they stay dense."""
    called = set(described.linears())
    return [n for n, module in layer.named_modules() if isinstance(module, nn.Linear) and n not in called]
