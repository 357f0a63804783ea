"""Registers the checkpoint format with transformers, so that from_pretrained builds our modules.

Importing this file is enough. A copy of it and of its neighbours lies in every checkpoint, where
`trust_remote_code=True` imports it; so it depends on nothing but torch, transformers and them.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .linear import LowRankLinear, PIFALinear, PivotOrderLinear
from .narrow import PaddedHeads, PickedHeads
from .packed import PackedLinear

METHOD = "pifa"
FORMAT_VERSION = 1
# "dense" is one more kind: an nn.Linear, left alone unless some of its channels are gone
KINDS: dict[str, type[LowRankLinear] | type[PIFALinear]] = {"lowrank": LowRankLinear, "pifa": PIFALinear}
FACTORS = {"lowrank": ("v", "u"), "pifa": ("pivot", "coeff")}  # in the order in which they are applied
NARROW: dict[str, type[PaddedHeads] | type[PickedHeads]] = {"narrow_out": PaddedHeads, "narrow_in": PickedHeads}


class PIFAConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint: which linears are stored in which form.

    layers: full module name -> {"kind": "lowrank" | "pifa" | "dense", "rank": int, "in_features", "out_features"},
    and where the checkpoint is folded "folded": ["inputs"] or ["outputs"], the side on which the linear's channels
    stand in the order of pivots that come before or here. A pivoted linear with such outputs has nothing to reorder.
    With "bits" and "group_size" its factors, or the dense linear itself, are packed integers (packed.py); "outer_bits"
    are those of the factor that is applied last, where it has others.
    Kinds "narrow_out" and "narrow_in" have "heads" and "width" in place of a rank: how many channels of each head are
    stored (narrow.py). A dense linear may have "kept_out" or "kept_in", where fewer channels are left than the family's
    config says. Features are those of the dense model everywhere.

    Raises: ValueError for a format_version or a kind that this code does not know.
    """

    def __init__(self, layers: dict[str, dict[str, Any]] | None = None, format_version: int = FORMAT_VERSION, **_):
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has PIFA format {format_version}, and this code reads {FORMAT_VERSION}: update PIFA"
            )
        self.quant_method = METHOD  # type: ignore[assignment]  # an enum of the built-in methods
        self.format_version = format_version
        self.layers = layers or {}
        unknown = {entry["kind"] for entry in self.layers.values()} - {*KINDS, *NARROW, "dense"}
        if unknown:
            raise ValueError(f"unknown kind of layer in the checkpoint: {', '.join(sorted(unknown))}")


def made_of(linear: nn.Linear, entry: dict[str, Any]) -> nn.Module:
    """What stands in the linear's place, with nothing in it yet; the linear itself where it is as it was."""
    kind, has_bias = entry["kind"], linear.bias is not None
    sizes = linear.in_features, linear.out_features
    like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    if kind in NARROW:
        return NARROW[kind](*sizes, entry["heads"], entry["width"], has_bias, **like)
    if kind == "dense":
        left = entry.get("kept_in", sizes[0]), entry.get("kept_out", sizes[1])
        return linear if left == sizes else nn.Linear(*left, has_bias, **like)
    layer = KINDS[kind]
    if layer is PIFALinear and "outputs" in entry.get("folded", ()):
        layer = PivotOrderLinear
    return layer(*sizes, entry["rank"], has_bias, **like)


def packed(linear: nn.Module, entry: dict[str, Any]) -> nn.Module:
    """The layer with packed linears, with nothing in them yet, for its two factors, or one for all of it where its
    entry is dense: as integers factors may have become one matrix.
    """
    if entry["kind"] == "dense":
        like = next(linear.parameters())
        how = {"device": like.device, "dtype": like.dtype, "bias": linear.bias is not None}
        return PackedLinear(linear.in_features, linear.out_features, entry["bits"], entry["group_size"], **how)
    inner, outer = FACTORS[entry["kind"]]
    for factor, bits in ((inner, entry["bits"]), (outer, entry.get("outer_bits", entry["bits"]))):
        setattr(linear, factor, packed(getattr(linear, factor), {**entry, "kind": "dense", "bits": bits}))
    return linear


class PIFAQuantizer(HfQuantizer):
    """Swaps linears for the stored kind before the weights are read."""

    quantization_config: PIFAConfig
    requires_calibration = True  # a dense checkpoint cannot be loaded with this config: it has to be compressed

    def _process_model_before_weight_loading(self, model, **_):
        for name, entry in self.quantization_config.layers.items():
            linear = made_of(model.get_submodule(name), entry)
            if "bits" in entry:
                linear = packed(linear, entry)
            model.set_submodule(name, linear)

    def _process_model_after_weight_loading(self, model, **_):
        return model

    def update_parallel_plan(self, model, plan):
        """A plan that shards a linear by rows or columns has no meaning for its factors: such names leave the plan."""
        swapped = [name.rsplit(".", 1)[-1] for name in self.quantization_config.layers]
        for pattern in [key for key in plan if key.rsplit(".", 1)[-1] in swapped]:
            del plan[pattern]

    def is_serializable(self, *_, **__) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return not any("bits" in entry for entry in self.quantization_config.layers.values())

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model, dtype=None):
        """Back to nn.Linear of the config's sizes, in place. Folded channels stay in their order, and in the place of
        those that are gone come zeros: the model is the same function.
        """
        for name, entry in self.quantization_config.layers.items():
            layer = model.get_submodule(name)
            sizes = entry["in_features"], entry["out_features"]
            bias: Tensor | None
            if hasattr(layer, "dense_weight"):
                weight = layer.dense_weight()
                bias = layer.dense_bias() if hasattr(layer, "dense_bias") else layer.bias
            elif (layer.in_features, layer.out_features) != sizes:
                missing = entry["out_features"] - layer.out_features
                weight = F.pad(layer.weight, (0, entry["in_features"] - layer.in_features, 0, missing))
                bias = None if layer.bias is None else F.pad(layer.bias, (0, missing))
            else:
                continue
            weight = weight.to(dtype or layer.weight.dtype)
            linear = nn.Linear(*sizes, bias is not None, "meta", weight.dtype)
            linear.weight = nn.Parameter(weight.detach())
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach().to(weight.dtype))
            model.set_submodule(name, linear)
        return model


class AutoConfigWithPIFA:
    """What `auto_map` names: importing it registers the format; the config itself stays the family's own."""

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Asked for by AutoConfig; the family's own class is what gets saved, so there is nothing to note."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        config, _ = PretrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return CONFIG_MAPPING[config["model_type"]].from_pretrained(pretrained_model_name_or_path, **kwargs)


if METHOD not in AUTO_QUANTIZER_MAPPING:  # a checkpoint's copy may come after the installed one, or twice
    register_quantizer(METHOD)(PIFAQuantizer)
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(PIFAConfig)
