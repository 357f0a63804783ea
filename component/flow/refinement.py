"""Refine a finished decoder layer by gradient: all its factors together, towards what the whole layer should return.

The solvers fit one linear at a time. Tuned together, the factors of a layer make up for each other's errors (the
block-level refinement of AA-SVD, arXiv 2604.02119; there norms are trained too, and a token counts by its size).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import get_cosine_schedule_with_warmup

from component.format.linear import LowRankLinear
from utils.errors import RunError
from utils.layers import map_tensors
from utils.precision import matmul_precision

LEARNING_RATE = 0.2  # the most by which a step changes an output, relative to its size: `step_size`
WARM_UP = 0.1  # of the steps; Adam's first ones are as long as the rate allows, whatever the gradient
BETAS = (0.9, 0.95)
EPSILON = 1e-15  # far below the gradient of a mean over many tokens, so that Adam stays free of its unit
CLIP = 2.0  # of the first gradient's norm
CHECKPOINTS = 4  # evenly spaced; each is judged, the best is kept
JUDGED_SHARE, JUDGED_MOST = 8, 16  # one window in so many judges, and no more than that


Loss = Callable[[Mapping[str, Tensor], Tensor], Tensor]  # of weights by name, and of windows by number


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How the optimiser goes. steps: how many; batch: windows that each of them sees; seed: of the draws of windows.

    learning_rate: the most by which a step changes an output, relative to its size (see `step_size`).
    """

    steps: int
    batch: int
    learning_rate: float = LEARNING_RATE
    seed: int = 0


def refine_layer(
    layer: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    keywords: dict[str, Any],
    descent: Descent,
    name: str = "layer",
) -> tuple[float, float]:
    """Tune `u.weight` and `v.weight` of every LowRankLinear in the layer, in place; all else stays as it is.

    inputs, targets: (windows, length, width), any float dtype and device: the hidden states that enter the layer, and
    those that it should return. keywords: the layer's keyword arguments. The last windows only judge: `relative_error`
    there, with weights in the layer's own dtype, decides between the factors as they are and those of a few
    checkpoints. With one window, it does both.

    Returns (loss before, loss after), after <= before; with no steps or no factors the two are equal.
    Raises: RunError, with `name`, where a loss is not finite; the layer is then as it was.
    """
    dtype = next(layer.parameters()).dtype
    training, judging = split_windows(len(inputs))
    data: dict[str, Any] = {"inputs": inputs, "targets": targets, "keywords": keywords, "name": name}
    own = _loss_in(dtype, layer, **data)

    @torch.no_grad()
    def judge(factors: Mapping[str, Tensor]) -> float:
        parts = judging.split(descent.batch)
        return sum(own(factors, part).item() * len(part) for part in parts) / len(judging)

    start = {key: weight.detach() for key, weight in factors_of(layer).items()}
    before = judge(start)
    if descent.steps == 0 or not start:
        return before, before
    wide = torch.promote_types(dtype, torch.float32)  # half precision would lose small steps, and fp16 gradients
    others = {key: t for key, t in (*layer.named_parameters(), *layer.named_buffers()) if key not in start}
    loss = _loss_in(wide, layer, fixed=_converted(others, next(layer.parameters()).device, wide), **data)
    masters = {key: weight.to(wide, copy=True).requires_grad_() for key, weight in start.items()}
    best, after = start, before
    for _ in _checkpoints(masters, loss, training, descent=descent):
        stored = {key: weight.detach().to(start[key].dtype, copy=True) for key, weight in masters.items()}
        error = judge(stored)
        if error < after:
            best, after = stored, error
    with torch.no_grad():
        for key, parameter in factors_of(layer).items():
            parameter.copy_(best[key])
    return before, after


def _loss_in(
    precision: torch.dtype,
    layer: nn.Module,
    *,
    inputs: Tensor,
    targets: Tensor,
    keywords: dict[str, Any],
    name: str,
    fixed: Mapping[str, Tensor] = MappingProxyType({}),
) -> Loss:
    """The relative error of the layer with other weights, on hidden states in this precision.

    fixed: what else stands in place of the layer's own tensors.
    """
    device = next(layer.parameters()).device
    kwargs = _converted(keywords, device, precision)

    def loss(weights: Mapping[str, Tensor], windows: Tensor) -> Tensor:
        hidden = inputs[windows.to(inputs.device)].to(device, precision)
        output = functional_call(layer, {**fixed, **weights}, (hidden,), kwargs)
        output = output[0] if isinstance(output, (tuple, list)) else output
        error = relative_error(output, targets[windows.to(targets.device)].to(device))
        if not torch.isfinite(error):
            raise RunError(f"{name}: the loss of its refinement is not finite")
        return error

    return loss


def _checkpoints(masters: dict[str, Tensor], loss: Loss, windows: Tensor, *, descent: Descent) -> Iterator[int]:
    """Step after step, in place; yields the number of steps made where the factors are worth a look."""
    rates = [descent.learning_rate * step_size(w) for w in masters.values()]
    groups = [{"params": [w], "initial_lr": rate} for w, rate in zip(masters.values(), rates, strict=True)]
    optimiser = torch.optim.Adam(groups, lr=descent.learning_rate, betas=BETAS, eps=EPSILON)
    schedule = schedule_of(optimiser, descent.steps)
    judged = {math.ceil(descent.steps * share / CHECKPOINTS) for share in range(1, CHECKPOINTS + 1)}
    limit = math.inf
    batches = draws(windows, steps=descent.steps, batch=descent.batch, seed=descent.seed)
    for step, batch in enumerate(batches, start=1):
        optimiser.zero_grad()
        with torch.enable_grad(), matmul_precision("high"):  # TF32: ten bits do for a gradient
            loss(masters, batch).backward()
        norm = nn.utils.clip_grad_norm_(masters.values(), limit).item()
        limit = CLIP * norm if step == 1 else limit
        optimiser.step()
        schedule.step()
        if step in judged:
            yield step


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


def draws(windows: Tensor, *, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of the windows: shuffled, all used before one comes again. A batch is no larger than they are."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, len(windows))
    rounds = math.ceil(steps * batch / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(rounds)])
    return iter(windows[order[: steps * batch]].split(batch))


def schedule_of(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear rise over the first tenth of the steps, then half a cosine towards zero.

    Every step counts: the first one is 1 / rise of the full rate, and the last one is still above zero. That is
    transformers' schedule for one step more, begun at its second. The groups of the optimiser need `initial_lr`.
    """
    rise = max(1, round(WARM_UP * steps))
    return get_cosine_schedule_with_warmup(optimiser, rise, steps + 1, last_epoch=0)


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
