"""--prune asvd through the front door: the driver collects mean |x| of the dense flow, and nothing else."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from component.flow.means import Flows, Means
from component.flow.streaming import Compression, compress_layers
from component.ranks.sizes import Rank
from component.solve.moments import Moments
from component.solve.names import default_step
from component.solve.solvers import make_solver
from tests import tiny
from utils.layers import HeldLayers, describe_layers

WINDOWS = tiny.token_windows(6, 32)
WHITENING = 4  # windows of the six


def dense_inputs(model: nn.Module, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Full name -> (d_in, tokens) in float64, of every linear, in the original model."""
    found: dict[str, torch.Tensor] = {}
    linears = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def hook(module, arguments, output):
        found[linears[module]] = arguments[0].flatten(0, -2).T.double()

    hooks = [module.register_forward_hook(hook) for module in linears]
    with torch.no_grad():
        model(windows, use_cache=False)
    for one in hooks:
        one.remove()
    return found


def asvd_by_hand(weight: torch.Tensor, x: torch.Tensor, rank: int) -> torch.Tensor:
    scale = x.abs().mean(1).sqrt()
    u, sigma, v = torch.linalg.svd(weight.double() * scale, full_matrices=False)
    return (u[:, :rank] * sigma[:rank] @ v[:rank]) / scale


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen2"])
def test_the_driver_is_asvd_by_hand(family, batch):
    model = tiny.build(family)
    described = describe_layers(model)
    plan = {f"{layer.name}.{name}": Rank(9) for layer in described for name in layer.linears()}
    flows = Flows(WINDOWS, whitening=WHITENING, reconstruction=len(WINDOWS))
    means = Means(torch.device("cpu"), HeldLayers(model), batch=batch)
    compression = Compression(plan, make_solver("asvd", 0, mix_ratio=0.25), dtype=torch.float64)
    inputs = dense_inputs(model, WINDOWS[:WHITENING])
    layers = compress_layers(model, described, compression, flows=flows, means=means)
    for index, layer in layers:
        for name in described[index].linears():
            full = f"{described[index].name}.{name}"
            expected = asvd_by_hand(model.get_submodule(full).weight, inputs[full], 9)
            assert tiny.relative(layer.get_submodule(name).dense_weight(), expected) < 1e-5


def test_asvd_starts_a_reconstruction_too():
    weight, x = tiny.rand(8, 6), tiny.rand(6, 40, seed=1)
    moments = Moments(gram=tiny.gram_of(x), dense_magnitude=x.abs().sum(1))
    u, v = make_solver("asvd", 1, mix_ratio=0.0).solve(weight, moments, 3, what="a")
    _, start = make_solver("asvd", 0, mix_ratio=0.0).solve(weight, moments, 3, what="a")
    best = weight @ x @ torch.linalg.pinv(start @ x)  # of all U, the one that loses least with this V
    assert tiny.relative(u @ v, best @ start) < 1e-3


@pytest.mark.parametrize("step", [0, 1, None])
def test_asvd_asks_for_magnitudes_only_where_it_reads_them(step):
    solver = make_solver("asvd", step, mix_ratio=0.0)
    assert (solver.needs_dense_magnitude, solver.needs_dense_gram) == (step is not None, False)
    assert solver.needs_dense_flow == (step is not None) and solver.needs_low_rank_flow == (step != 0)
    assert (
        make_solver("svd-llm", 0, mix_ratio=0.0).needs_dense_flow
        and not make_solver("svd", 0, mix_ratio=0.0).needs_dense_flow
    )


def test_asvd_is_left_as_it_is_by_default():
    assert default_step("asvd") == 0


def test_every_row_of_the_baselines_can_be_made(arguments, tmp_path, good):
    """svd, asvd, W, W + U: four different checkpoints of one size, each of which transformers loads."""
    rows = {
        "svd": {"prune": "svd"},
        "asvd": {"prune": "asvd"},
        "W": {"reconstruct_step": 0},
        "W+U": {"reconstruct_step": 1, "old_output_factor": 0},
    }
    found = {}
    for row, flags in rows.items():
        record = good(arguments("m", save_path=tmp_path, density=0.6, **{"no-use_pifa": True}, **flags))
        assert record["density"] <= 0.6 and record["allocation"] == "uniform"
        model = AutoModelForCausalLM.from_pretrained(Path(record["path"]), dtype=torch.float32)
        found[row] = model.get_submodule("model.layers.0.mlp.down_proj").dense_weight()
    assert len({tuple(weight[0].tolist()) for weight in found.values()}) == 4
