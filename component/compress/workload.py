"""From a model and the settings to the numbers that estimate.py asks for, and what it answers, in words."""

import logging
from typing import Any

import torch
from transformers import PreTrainedModel

from component.compress.estimate import Estimate, Shapes, Work
from component.compress.settings import Settings
from component.flow.means import Flows
from component.ranks.allocation import reads_profile, uniform
from component.ranks.budget import Budget, Module
from component.ranks.cost import LOW_RANK
from component.solve.solvers import make_solver
from utils import report
from utils.layers import DecoderLayer

log = logging.getLogger("pifa")


def announce(settings: Settings, modules: list[Module], flows: Flows, *, device: torch.device, needs: Estimate) -> None:
    """What is about to be done, and what it takes."""
    log.info(
        "density %g (ratio removed %g), %d linears, %d windows of %d tokens on %s",
        settings.density, 1 - settings.density, len(modules), *flows.windows.shape, device,
    )  # fmt: skip
    parts = {"device memory": needs.device, "host memory": needs.host, "disk": needs.disk}
    said = ", ".join(f"{part} {size / report.GIB:.2f} GiB" for part, size in parts.items() if size is not None)
    log.info("estimate: %s (of it %.2f GiB hidden states while it runs)", said, needs.mapped / report.GIB)
    if needs.host - report.resident_memory() > report.available_memory():
        log.warning("that is more host memory than is free: use fewer windows, or --host_memory to map them from files")
    tokens = flows.reconstruction * flows.windows.shape[1]
    rows = max(module.d_in for module in modules)
    if tokens < rows:
        log.warning(
            "%d calibration tokens for Gram matrices of %d rows: at least %d windows would be needed",
            tokens, rows, -(-rows // flows.windows.shape[1]),
        )  # fmt: skip


def shapes_of(model: PreTrainedModel, described: list[DecoderLayer], modules: list[Module]) -> Shapes:
    """Of the layer with most numbers."""
    shape = {module.name: (module.d_out, module.d_in) for module in modules}

    def groups_of(layer: DecoderLayer) -> tuple[tuple[tuple[int, int], ...], ...]:
        return tuple(tuple(shape[f"{layer.name}.{name}"] for name in group) for group in layer.groups)

    embeddings: Any = model.get_input_embeddings()
    layers = tuple(f"{layer.name}." for layer in described)
    rest = sum(tensor.numel() for name, tensor in model.named_parameters() if not name.startswith(layers))
    largest = max(described, key=lambda layer: sum(m * n for group in groups_of(layer) for m, n in group))
    attention = sum(group[0] in largest.attention for group in largest.groups)
    return Shapes(
        width=embeddings.weight.shape[1],
        layers=len(described),
        groups=groups_of(largest),
        attention=attention,
        rest=rest,
        size=embeddings.weight.element_size(),
    )


def work_of(settings: Settings, modules: list[Module], flows: Flows, *, batch: int, processes: int = 1) -> Work:
    """What each of so many processes does, as the flags ask for it, with ranks as uniform allocation gives them."""
    recipe = settings.recipe()
    solver = make_solver(
        settings.prune, settings.reconstruct_step, mix_ratio=recipe.old_output_factor, drift_ratio=recipe.drift_factor
    )
    ranks = uniform(Budget(modules, settings.density, settings.storage))
    length = flows.windows.shape[1]
    profiles = reads_profile(settings.allocation) or recipe.output_shrinkage is not None or recipe.token_power
    two = solver.needs_low_rank_flow
    return Work(
        tokens=-(-flows.needed_by(solver).numel() // processes),
        batch_tokens=min(batch, len(flows.windows)) * length,
        flows=2 if two else 1,
        states=2 + bool(settings.refine_steps) if two else 1,
        profiled=min(settings.profile_nsamples, len(flows.windows)) * length if profiles else 0,
        square=solver.needs_dense_gram + solver.needs_gram + solver.needs_cross,
        drift=int(solver.needs_drift),
        stored=sum(LOW_RANK.stored(ranks[module.name].number, module.d_out, module.d_in) for module in modules),
        weighted=recipe.output_shrinkage is not None,
    )
