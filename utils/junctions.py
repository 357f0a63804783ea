"""Which linears of a decoder layer are joined channel by channel, found by looking at what the layer computes.

The linears of a layer are replaced by stand-ins with random outputs, so none of their weights is needed. What moves
when one output moves shows which linears it reaches without passing through another one; a random permutation of
channels shows whether it travels unchanged. In LLaMA, down's input is silu(gate) * up: to permute the channels of gate
and up permutes down's input, and nothing else sees them.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import accelerate
import torch
import transformers
from torch import Tensor, nn

from utils.layers import PROBE_LENGTH, decoder_layers, layer_inputs, map_tensors, run_layer, watching

CLOSE = 1e-12  # relative, in float64; what is not exact comes out near 1, or near 1e-7 through a float32 norm


class Junction(NamedTuple):
    """Permuting the output channels of all `producers` alike permutes the input of `consumer`, and does nothing else.

    Full names of linears.
    """

    producers: tuple[str, ...]
    consumer: str


class StandIn(nn.Module):
    """In place of a linear: notes what it is given, and returns normal numbers, the same ones at every forward pass."""

    def __init__(self, linear: nn.Linear, seed: int):
        super().__init__()
        self.in_features, self.out_features, self.seed = linear.in_features, linear.out_features, seed
        self.__dict__["weight"] = linear.weight  # some families read its dtype; not a parameter, so never copied
        self.order: Tensor | None = None  # of the output's channels
        self.shift = 0.0  # added to the output
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (*x.shape[:-1], self.out_features)
        y = torch.randn(shape, generator=generator, dtype=x.dtype) + self.shift
        return y if self.order is None else y[..., self.order]


class LayerProbe:
    """A decoder layer in float64 with stand-ins for its linears, and inputs to run it on.

    name: of the layer; linears go by their full names.
    """

    def __init__(self, name: str, layer: nn.Module, hidden: Tensor, *, keywords: dict[str, Any]):
        linears = [(f"{name}.{place}", m) for place, m in layer.named_modules() if isinstance(m, nn.Linear)]
        self.stand_ins = {full: StandIn(module, seed) for seed, (full, module) in enumerate(linears)}
        memo: dict[int, Any] = {id(module): self.stand_ins[full] for full, module in linears}
        self.name, self.layer = name, copy.deepcopy(layer, memo).double()
        self.hidden, self.keywords = (map_tensors(value, _double) for value in (hidden, keywords))

    @torch.no_grad()
    def run(self) -> tuple[dict[str, Tensor], Tensor]:
        """What every linear is given that is called exactly once, by name, and the layer's output."""
        for stand_in in self.stand_ins.values():
            stand_in.inputs = []
        output = run_layer(self.layer, self.hidden, self.keywords)
        return {name: s.inputs[0] for name, s in self.stand_ins.items() if len(s.inputs) == 1}, output

    @torch.no_grad()
    def output_of(self, name: str, modules: Mapping[str, nn.Module]) -> Tensor:
        """The output of linear `name` when the layer runs with `modules` in the places of their stand-ins."""
        outputs: list[Tensor] = []
        self._put(modules)
        with watching(self.layer, [self._place(name)], lambda _name, _x, y: outputs.append(y)):
            run_layer(self.layer, self.hidden, self.keywords)
        self._put({full: self.stand_ins[full] for full in modules})
        return outputs[0]

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        for full, module in modules.items():
            self.layer.set_submodule(self._place(full), module)

    def _place(self, full: str) -> str:
        return full.removeprefix(f"{self.name}.")

    @cached_property
    def junctions(self) -> list[Junction]:
        """Every consumer whose input is joined channel by channel to the outputs of the linears before it."""
        before, output = self.run()
        reached = {name: self._reached_from(name, before, output) for name in before}
        found = []
        for consumer in before:
            producers = tuple(name for name in before if consumer in reached[name])
            if (
                producers
                and all(reached[name] == {consumer} for name in producers)
                and self._carries_permutations(Junction(producers, consumer), before[consumer])
            ):
                found.append(Junction(producers, consumer))
        return found

    def _reached_from(self, name: str, before: dict[str, Tensor], output: Tensor) -> set[str]:
        """Linears whose input moves with this one's output when all other outputs stay; "" is the layer's output."""
        self.stand_ins[name].shift = 1.0
        after, new_output = self.run()
        self.stand_ins[name].shift = 0.0
        moved = {other for other in before if not torch.equal(before[other], after[other])}
        return moved if torch.equal(output, new_output) else {*moved, ""}

    def _carries_permutations(self, junction: Junction, before: Tensor) -> bool:
        stand_ins = [self.stand_ins[name] for name in junction.producers]
        channels = self.stand_ins[junction.consumer].in_features
        if any(stand_in.out_features != channels for stand_in in stand_ins):
            return False
        order = torch.randperm(channels, generator=torch.Generator().manual_seed(0))
        for stand_in in stand_ins:
            stand_in.order = order
        after = self.run()[0][junction.consumer]
        for stand_in in stand_ins:
            stand_in.order = None
        return bool((after - before[..., order]).norm() <= CLOSE * before.norm())


def _double(tensor: Tensor) -> Tensor:
    return tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()


class Skeleton:
    """The model that a config describes, with no weight read and none of its linears allocated: what they are joined
    by does not depend on them. Parameters that the layers have besides (norms) are random.
    """

    def __init__(self, config: transformers.PretrainedConfig):
        with accelerate.init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
        layers = decoder_layers(model)
        inside = {id(module) for _, layer in layers for module in layer.modules()}
        for module in model.get_decoder().modules():
            if id(module) not in inside:  # embeddings can be large: one number, seen as many
                _fill(module, lambda shape: torch.ones(()).expand(shape))
        probe = torch.arange(PROBE_LENGTH)[None] % model.get_input_embeddings().weight.shape[0]
        hidden, keywords = layer_inputs(model, probe)
        self.shape, self.keywords = hidden.shape, dict(zip((name for name, _ in layers), keywords, strict=True))
        self.layers = dict(layers)

    def probe_of(self, linears: Collection[str]) -> LayerProbe | None:
        """A probe of the decoder layer that holds linears of these full names; None where none does."""
        name = next((name for name in self.layers if any(full.startswith(f"{name}.") for full in linears)), None)
        if name is None:
            return None
        generator = torch.Generator().manual_seed(0)
        for module in self.layers[name].modules():
            if not isinstance(module, nn.Linear):
                _fill(module, lambda shape: torch.randn(shape, generator=generator))
        hidden = torch.randn(self.shape, generator=generator)
        return LayerProbe(name, self.layers[name], hidden, keywords=self.keywords[name])


def _fill(module: nn.Module, values: Callable[[torch.Size], Tensor]) -> None:
    """Give the module's own parameters values."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, nn.Parameter(values(parameter.shape), requires_grad=False))
