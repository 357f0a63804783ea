"""Registers the checkpoint format with transformers, so that from_pretrained builds our modules.

Importing this file is enough. A copy of it and of its neighbours lies in every checkpoint, where
`trust_remote_code=True` imports it; so it depends on nothing but torch, transformers and them.
"""

from typing import Any

from torch import nn
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

METHOD = "pifa"
FORMAT_VERSION = 1
# "dense" is the third kind: an nn.Linear, left alone
KINDS: dict[str, type[LowRankLinear] | type[PIFALinear]] = {"lowrank": LowRankLinear, "pifa": PIFALinear}


class PIFAConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint: which linears are stored in which form.

    layers: full module name -> {"kind": "lowrank" | "pifa" | "dense", "rank": int, "in_features", "out_features"},
    and where the checkpoint is folded "folded": ["inputs"] or ["outputs"], the side on which the linear's channels
    stand in the order of pivots that come before or here. A pivoted linear with such outputs has nothing to reorder.

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
        unknown = {entry["kind"] for entry in self.layers.values()} - {*KINDS, "dense"}
        if unknown:
            raise ValueError(f"unknown kind of layer in the checkpoint: {', '.join(sorted(unknown))}")


class PIFAQuantizer(HfQuantizer):
    """Swaps linears for the stored kind before the weights are read."""

    quantization_config: PIFAConfig
    requires_calibration = True  # a dense checkpoint cannot be loaded with this config: it has to be compressed

    def _process_model_before_weight_loading(self, model, **_):
        for name, entry in self.quantization_config.layers.items():
            if entry["kind"] == "dense":
                continue
            linear = model.get_submodule(name)
            like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
            has_bias = linear.bias is not None
            kind = KINDS[entry["kind"]]
            if kind is PIFALinear and "outputs" in entry.get("folded", ()):
                kind = PivotOrderLinear
            model.set_submodule(name, kind(linear.in_features, linear.out_features, entry["rank"], has_bias, **like))

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
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model, dtype=None):
        """Back to nn.Linear, in place. Folded channels stay in their order: the model is the same function."""
        for name in self.quantization_config.layers:
            layer = model.get_submodule(name)
            if not isinstance(layer, LowRankLinear | PIFALinear):
                continue
            weight = layer.dense_weight().to(dtype or layer.weight.dtype)
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta", weight.dtype)
            linear.weight = nn.Parameter(weight.detach())
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.detach().to(weight.dtype))
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
