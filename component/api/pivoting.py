"""Pivot the low-rank linears of a model in memory, as --mode pifa does with a folder."""

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from component.api.compressing import note, noted
from component.format.linear import LowRankLinear, PIFALinear
from component.pivot.pivoting import pivot
from utils.errors import UsageError


@torch.no_grad()
def pivot_model(model: PreTrainedModel, *, device: str | None = None) -> PreTrainedModel:
    """Replace every LowRankLinear by a PIFALinear of the same function, in place; returns the model.

    A linear of rank r stores r (m + n) - r^2 + m numbers then, where U and V take r (m + n) (PIFA, arXiv 2501.19090).
    Pivots are found in float64 and stored in the layer's dtype. device: what the work is done on; None leaves it where
    the layers are.

    Raises: UsageError for a model without low-rank linears, RunError where factors are not finite.
    """
    config = getattr(model.config, "quantization_config", None)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is LowRankLinear}
    if not layers or config is None:
        raise UsageError("the model has no low-rank linears to pivot: compress_model makes them")
    for name, layer in tqdm(layers.items(), desc="pivot", unit="linear"):
        pivoted = _pivoted(layer, name, device=device)
        model.set_submodule(name, pivoted)
        config.layers[name].update(kind="pifa", rank=pivoted.pivot.weight.shape[0])
    record = noted(model)
    if record is not None:
        note(model, {**record, "kind": "pifa"})
    return model


def _pivoted(layer: LowRankLinear, name: str, *, device: str | None = None) -> PIFALinear:
    """The same function as pivots and coefficients. Raises: RunError, with `name`, for factors that are not finite."""
    u, v = (factor.weight.to(device) for factor in (layer.u, layer.v))
    pivoted = PIFALinear.from_pivots(*pivot(u, v, name), layer.bias, layer.u.weight.dtype)
    return pivoted.to(layer.u.weight.device).requires_grad_(False)
