"""Refine a finished decoder layer by gradient: all its factors together, towards what the whole layer should return.

The solvers fit one linear at a time. Tuned together, the factors of a layer make up for each other's errors (the
block-level refinement of AA-SVD, arXiv 2604.02119; there norms are trained too, and a token counts by its size).
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from component.format.linear import LowRankLinear
from component.solve.moments import matmul_precision
from utils.errors import RunError
from utils.layers import map_tensors

LEARNING_RATE = 0.2  # the most by which a step changes an output, relative to its size: `step_size`
WARM_UP = 0.1  # of the steps; Adam's first ones are as long as the rate allows, whatever the gradient
BETAS = (0.9, 0.95)
EPSILON = 1e-15  # far below the gradient of a mean over many tokens, so that Adam stays free of its unit
CLIP = 2.0  # of the first gradient's norm
CHECKPOINTS = 4  # evenly spaced; each is judged, the best is kept
JUDGED_SHARE, JUDGED_MOST = 8, 16  # one window in so many judges, and no more than that


def refine_layer(
    layer: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    keywords: dict[str, Any],
    steps: int,
    batch: int,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    name: str = "layer",
) -> tuple[float, float]:
    """Tune `u.weight` and `v.weight` of every LowRankLinear in the layer, in place; all else stays as it is.

    inputs, targets: (windows, length, width), any float dtype and device: the hidden states that enter the layer, and
    those that it should return. keywords: the layer's keyword arguments. Each of `steps` optimiser steps sees `batch`
    windows. The last windows only judge: `relative_error` there, with weights in the layer's own dtype, decides
    between the factors found and those of a few checkpoints. With one window, it does both.

    Returns (loss before, loss after), after <= before; with no steps or no factors the two are equal.
    Raises: RunError, with `name`, where a loss is not finite; the layer is then as it was.
    """
    first = next(layer.parameters())
    device, dtype = first.device, first.dtype
    wide = torch.promote_types(dtype, torch.float32)  # half precision would lose small steps, and fp16 gradients
    training, judging = split_windows(len(inputs))

    def loss(weights: Mapping[str, Tensor], kwargs: dict[str, Any], chosen: Tensor, precision: torch.dtype) -> Tensor:
        hidden = inputs[chosen.to(inputs.device)].to(device, precision)
        output = functional_call(layer, dict(weights), (hidden,), kwargs)
        output = output[0] if isinstance(output, (tuple, list)) else output
        error = relative_error(output, targets[chosen.to(targets.device)].to(device))
        if not torch.isfinite(error):
            raise RunError(f"{name}: the loss of its refinement is not finite")
        return error

    own = _converted(keywords, device, dtype)

    @torch.no_grad()
    def judge(factors: Mapping[str, Tensor]) -> float:
        parts = judging.split(batch)
        return sum(loss(factors, own, part, dtype).item() * len(part) for part in parts) / len(judging)

    found = {key: weight.detach() for key, weight in factors_of(layer).items()}
    before = judge(found)
    if steps == 0 or not found:
        return before, before

    others = [*layer.named_parameters(), *layer.named_buffers()]
    fixed = _converted({key: tensor for key, tensor in others if key not in found}, device, wide)
    kwargs = _converted(keywords, device, wide)
    masters = {key: weight.to(wide, copy=True).requires_grad_() for key, weight in found.items()}
    groups = [{"params": [w], "lr": learning_rate * step_size(w)} for w in masters.values()]
    optimiser = torch.optim.Adam(groups, lr=learning_rate, betas=BETAS, eps=EPSILON)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: pace(done, steps))
    judged = {math.ceil(steps * share / CHECKPOINTS) for share in range(1, CHECKPOINTS + 1)}
    best, after, limit = found, before, math.inf
    for step, chosen in enumerate(draws(training, steps, batch, seed), start=1):
        optimiser.zero_grad()
        with torch.enable_grad(), matmul_precision("high"):  # TF32: ten bits do for a gradient
            loss({**fixed, **masters}, kwargs, chosen, wide).backward()
        norm = nn.utils.clip_grad_norm_(masters.values(), limit).item()
        limit = CLIP * norm if step == 1 else limit
        optimiser.step()
        schedule.step()
        if step in judged:
            stored = {key: weight.detach().to(found[key].dtype, copy=True) for key, weight in masters.items()}
            error = judge(stored)
            if error < after:
                best, after = stored, error
    with torch.no_grad():
        for key, parameter in factors_of(layer).items():
            parameter.copy_(best[key])
    return before, after


def step_size(factor: Tensor) -> float:
    """RMS / sqrt(n) of a factor: (m, n): if each number moves by so much, no output does by more than its own size.

    A typical output is RMS |x| for an input x; such a step adds at most RMS / sqrt(n) |x|_1 <= RMS |x|. Rates in this
    unit hold for all widths, as in muP (arXiv 2203.03466).
    """
    return (factor.detach().square().mean() / factor.shape[1]).sqrt().item()


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2, in float32 or better. Both: (..., width).

    A sum of squares would be that of the few tokens whose states are a thousand times as large as the others'
    (massive activations, arXiv 2402.17762).
    """
    wide = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    output, target = output.to(wide), target.to(wide)
    size = target.square().sum(-1).clamp_min(torch.finfo(wide).tiny)
    return ((output - target).square().sum(-1) / size).mean()


def split_windows(count: int) -> tuple[Tensor, Tensor]:
    """Indices of the windows that train and of those that judge; the same one where there is only one."""
    judging = min(max(1, count // JUDGED_SHARE), JUDGED_MOST)
    indices = torch.arange(count)
    return indices[: max(1, count - judging)], indices[-judging:]


def draws(windows: Tensor, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of the windows: shuffled, all used before one comes again. A batch is no larger than they are."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, len(windows))
    rounds = math.ceil(steps * batch / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(rounds)])
    return iter(windows[order[: steps * batch]].split(batch))


def pace(done: int, steps: int) -> float:
    """The learning rate's factor after `done` of the steps: a linear rise to 1, then half a cosine towards zero."""
    rise = max(1, round(WARM_UP * steps))
    if done < rise:
        return (done + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (done - rise + 1) / (steps - rise + 1)))


def factors_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Parameter name -> parameter, of the factors of every LowRankLinear in the layer."""
    return {
        f"{prefix}.{factor}.weight": module.get_submodule(factor).get_parameter("weight")
        for prefix, module in layer.named_modules()
        if isinstance(module, LowRankLinear)
        for factor in ("u", "v")
    }


def _converted(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    def change(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype if tensor.is_floating_point() else None)

    return map_tensors(value, change)
