"""The training loop: AdamW on float32 weights, a schedule, steps that are skipped where numbers are not finite.

It is a plain loop. One process trains one model on one device, so what is left for a trainer class to do is what has
to be exact here: which rows a step sees, what a skipped step leaves alone, what a resumed run starts from.
"""

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from component.finetune.data import IGNORED, Batch
from utils.errors import RunError

BETAS, EPSILON, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.0  # decay would pull both factors of a product to zero
MEMORY = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for each parameter
CLIP = 1.0  # of the gradient's norm
MOST_SKIPPED = 10  # in a row
Point = dict[str, Any]  # of the loss curve: step, loss, norm, learning_rate; loss None where the step was skipped


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a stage is trained. steps: of the optimiser; warmup_ratio: share of them in which the learning rate rises.

    learning_rate: the highest; compute_dtype: of the products, float32 or bfloat16; seed: of dropout.
    """

    steps: int
    learning_rate: float
    warmup_ratio: float
    compute_dtype: torch.dtype
    seed: str


@dataclass
class Training:
    """Parameters in training, and how far they are.

    parameters: name -> float32 parameter, the only ones that change. `curve` has one point for each step done.
    teacher: a model of the same words on the same device, whose distributions take the place of the text's next words.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    schedule: Schedule
    curve: list[Point] = field(default_factory=list)
    teacher: nn.Module | None = None

    def __post_init__(self) -> None:
        rate = self.schedule.learning_rate
        group = {"params": list(self.parameters.values()), "initial_lr": rate}  # what a schedule that goes on asks for
        self.optimiser = torch.optim.AdamW([group], lr=rate, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY)

    def run(self, batches: Callable[[int], Sequence[Batch]], save: Callable[[], None], every: int) -> None:
        """Do the steps that are left, with a `save` after every so many, or none where `every` is 0.

        batches(step): the micro-batches that together are the batch of a step.

        Raises: RunError after MOST_SKIPPED steps in a row whose loss or gradient is not finite.
        """
        device = next(iter(self.parameters.values())).device
        done, total = len(self.curve), self.schedule.steps
        rates = rates_of(self.optimiser, self.schedule, done)
        self.model.train()
        forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with forked, _repeatable(), tqdm(total=total, initial=done, desc="finetune", unit="step") as bar:
            for step in range(done, total):
                self._advance(step, batches(step), device)
                rates.step()
                bar.update()
                bar.set_postfix(loss=self.curve[-1]["loss"])
                if every and (step + 1) % every == 0:
                    save()
        self.model.eval()

    def _advance(self, step: int, batches: Sequence[Batch], device: torch.device) -> None:
        torch.manual_seed(random.Random(f"{self.schedule.seed} {step}").getrandbits(63))
        rate = self.optimiser.param_groups[0]["lr"]
        targets = sum(count_targets(batch) for batch in batches)
        total = torch.zeros((), device=device)
        for batch in batches:
            loss = self._loss(batch, device) / targets
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        loss_value, norm_value = torch.stack([total, norm]).tolist()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            self.optimiser.step()
        self.optimiser.zero_grad()
        numbers = {"loss": loss_value, "norm": norm_value} if finite else {"loss": None, "norm": None}
        self.curve.append({"step": step + 1, **numbers, "learning_rate": rate})
        last = [point["loss"] for point in self.curve[-MOST_SKIPPED:]]
        if len(last) == MOST_SKIPPED and all(loss is None for loss in last):
            raise RunError(
                f"the loss or its gradient was not finite in {MOST_SKIPPED} steps in a row, up to step {step + 1}: "
                "lower --learning_rate, or compute in float32"
            )

    def _loss(self, batch: Batch, device: torch.device) -> Tensor:
        tokens, labels = batch.tokens.to(device), batch.labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.schedule.compute_dtype is torch.bfloat16):
            logits = self.model(input_ids=tokens, use_cache=False).logits
            if self.teacher is None:
                return summed_loss(logits, labels)
            with torch.no_grad():
                wanted = self.teacher(input_ids=tokens, use_cache=False).logits
        return summed_divergence(logits, wanted, labels)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters and the optimiser's memory of them."""
        held = {f"value.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            # an optimiser knows nothing of a parameter before its first gradient
            held |= {f"{key}.{name}": tensor for key, tensor in self.optimiser.state.get(parameter, {}).items()}
        return held

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], curve: list[Point]) -> None:
        """Stand where `tensors` and `curve` were taken."""
        self.curve = curve
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"value.{name}"])
            memory = {key: tensors[f"{key}.{name}"] for key in MEMORY if f"{key}.{name}" in tensors}
            if memory:  # the optimiser counts its steps on the CPU
                self.optimiser.state[parameter] = {
                    key: tensor.clone() if key == "step" else tensor.to(parameter.device, copy=True)
                    for key, tensor in memory.items()
                }


def rates_of(optimiser: torch.optim.Optimizer, schedule: Schedule, done: int) -> LRScheduler:
    """Gives the optimiser the learning rate of the step after `done`: a linear rise to the highest, then towards 0.

    The library's schedule begins and ends at 0. Those two are left out: of its steps + 2 rates the inner ones are used.
    """
    rise = round(schedule.warmup_ratio * schedule.steps)
    return get_linear_schedule_with_warmup(optimiser, rise + 1, schedule.steps + 1, last_epoch=done)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of all targets, in float32. logits: (rows, length, words), labels: (rows, length)."""
    scores = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(scores, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def summed_divergence(logits: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
    """Sum of KL(wanted || logits) at all targets, in float32: distillation (Hinton et al., arXiv 1503.02531), T = 1.

    logits, wanted: (rows, length, words); labels: (rows, length), of which only the places count.
    """
    counted = labels[:, 1:] != IGNORED
    student, teacher = (t[:, :-1][counted].float().log_softmax(dim=-1) for t in (logits, wanted))
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def count_targets(batch: Batch) -> int:
    return int((batch.labels[:, 1:] != IGNORED).sum())


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """Kernels that give the same numbers twice, where there are such; attention's gradient has a faster one on a GPU.

    A resumed run has to repeat the steps since its last state.
    """
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # finds errors, and costs time
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Dd]eterministic")
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step")  # a step that is skipped counts as one
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill
