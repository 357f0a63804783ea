"""The linears of a decoder layer that can get narrower: values and output of attention, and the three of the MLP."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from utils.errors import UsageError
from utils.layers import DecoderLayer

ROLES = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The linears of a layer that get narrower, by their names in it, and its heads.

    heads: of keys and values; query_heads: a multiple of it; channels: of the MLP.
    """

    value: str
    output: str
    gate: str
    up: str
    down: str
    heads: int
    query_heads: int
    head_dim: int
    channels: int

    @property
    def attention(self) -> tuple[str, str]:
        return self.value, self.output

    @property
    def mlp(self) -> tuple[str, str, str]:
        return self.gate, self.up, self.down


def parts_of(layer: nn.Module, described: DecoderLayer) -> Parts:
    """Raises: UsageError where the layer does not have each of the LLaMA family's projections once."""
    found = {role: [name for name in described.linears() if name.rsplit(".", 1)[-1] == role] for role in ROLES}
    head_dim = getattr(layer.get_submodule(described.linears()[0].rpartition(".")[0]), "head_dim", None)
    if head_dim is None or any(len(names) != 1 for names in found.values()):
        raise UsageError(
            f"--prune flatllm and auto need layers with {', '.join(ROLES)} and a head_dim; {described.name} has "
            f"{', '.join(described.linears())}"
        )
    value, output, gate, up, down = (names[0] for names in found.values())
    linears: dict[str, Any] = {name: layer.get_submodule(name) for name in (value, output, down)}
    return Parts(
        value=value,
        output=output,
        gate=gate,
        up=up,
        down=down,
        heads=linears[value].out_features // head_dim,
        query_heads=linears[output].in_features // head_dim,
        head_dim=head_dim,
        channels=linears[down].in_features,
    )
