"""The loss of a model on held-out windows with other layers in place of its own; one of them is in memory at a time."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from utils.errors import RunError
from utils.layers import advance, layer_inputs, logits_from, map_tensors, rest_on
from utils.placement import home
from utils.precision import full_precision


@torch.no_grad()
def window_losses(
    model: PreTrainedModel,
    layers: Iterable[tuple[int, nn.Module]],
    windows: Tensor,
    *,
    device: torch.device,
    batch: int = 1,
) -> Tensor:
    """Mean negative log-likelihood of every window, (count,) float64, with these layers in place of the model's own.

    layers: (index, layer on the device) in order, as compress_layers yields them; only one is held at a time.
    windows: (count, length) int64; batch: how many go through a layer at once. Norm and head run in float32.

    Raises: RunError where one is not finite.
    """
    states, keywords = layer_inputs(model, windows)
    states = states.to(home(states.nbytes, device))
    for index, layer in layers:
        with full_precision():
            advance(layer, states, map_tensors(keywords[index], lambda tensor: tensor.to(device)), batch=batch)
    losses = []
    with rest_on(model, device), full_precision():
        for window, hidden in zip(windows.to(device), states, strict=True):
            scores = logits_from(model, window[None], hidden[None].to(device, torch.float32))[0]
            losses.append(F.cross_entropy(scores[:-1].float(), window[1:]).double())
    found = torch.stack(losses).cpu()
    if not torch.isfinite(found).all():
        raise RunError("the loss on held-out windows is not finite")
    return found


def held_out_perplexity(
    model: PreTrainedModel,
    layers: Iterable[tuple[int, nn.Module]],
    windows: Tensor,
    *,
    device: torch.device,
    batch: int = 1,
) -> float:
    """Perplexity on the windows: see window_losses."""
    return window_losses(model, layers, windows, device=device, batch=batch).mean().exp().item()
