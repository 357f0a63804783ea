"""channels/flatllm.py and --prune flatllm: exact where nothing goes, and no more lost than the algebra says."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import PIFA
from component.channels.flatllm import (
    absorb_bases,
    compensated,
    head_axes,
    leverage_scores,
    most_telling,
    project_values,
    value_moment,
)
from component.channels.influence import block_influence, read_influence, write_influence
from component.channels.narrowing import Narrowing, narrow_entries, narrow_plan
from component.channels.parts import parts_of
from component.checkpoint.counting import stored_as
from component.flow.means import Flows, Means
from component.flow.modules import modules_of
from component.flow.streaming import Compression, compress_layers
from component.format.narrow import PaddedHeads, PickedHeads
from component.modes.bi import run as run_bi
from component.ranks.cost import PIVOTED
from component.ranks.sizes import DENSE, Channels
from component.solve.solvers import make_solver
from tests import tiny
from tests.checkpoint.test_checkpoint import elsewhere
from tests.tiny import gram_of, rand, relative
from utils.errors import UsageError
from utils.layers import HeldLayers, describe_layers

FAMILIES = ("llama", "llama-gqa", "qwen2", "qwen3", "mistral")
CPU = torch.device("cpu")
HEADS, HEAD_DIM = 2, 16
WINDOWS = tiny.token_windows(6, 24)


def correlated(channels: int, tokens: int, rank: int) -> torch.Tensor:
    """(channels, tokens): few directions and a little noise."""
    return rand(channels, rank, seed=1) @ rand(rank, tokens, seed=2) + 0.05 * rand(channels, tokens, seed=3)


def narrowed(model, density: float, mix_ratio: float = 0.0, dtype=torch.float64, plan=None):
    """(plan, the model with its layers narrowed, in place)."""
    described = describe_layers(model)
    modules = modules_of(model, described)
    parts = [parts_of(model.get_submodule(layer.name), layer) for layer in described]
    plan = plan or narrow_plan(modules, described, parts, density=density, influence=[1.0] * len(parts))
    narrowing = Narrowing({d.name: p for d, p in zip(described, parts, strict=True)}, mix_ratio=mix_ratio, damping=1e-6)
    flows = Flows(WINDOWS, whitening=len(WINDOWS), reconstruction=len(WINDOWS))
    compression = Compression(plan, make_solver("flatllm", 0, mix_ratio), dtype=dtype, layer_solver=narrowing)
    means = Means(CPU, HeldLayers(model), batch=2)
    layers = list(compress_layers(model, described, compression, flows=flows, means=means))
    for index, layer in layers:
        model.set_submodule(described[index].name, layer)
    return plan, model


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_all_channels_give_the_dense_model(family):
    """Every head in a basis of its own, and an MLP of all channels, compensated, in the same order or another."""
    model = tiny.build(family).double()
    before = model(WINDOWS).logits
    described = describe_layers(model)
    parts = [parts_of(model.get_submodule(layer.name), layer) for layer in described]
    plan = {}
    for layer, part in zip(described, parts, strict=True):
        plan |= dict.fromkeys((f"{layer.name}.{name}" for name in layer.linears()), DENSE)
        plan |= dict.fromkeys((f"{layer.name}.{name}" for name in part.attention), Channels(part.head_dim))
        plan |= dict.fromkeys((f"{layer.name}.{name}" for name in part.mlp), Channels(part.channels))
    weights = [model.get_submodule(f"{d.name}.{p.value}").weight.clone() for d, p in zip(described, parts, strict=True)]
    _, model = narrowed(model, 1.0, plan=plan)
    assert relative(model(WINDOWS).logits, before) < 1e-10
    for layer, part, weight in zip(described, parts, weights, strict=True):
        value = model.get_submodule(f"{layer.name}.{part.value}")
        assert isinstance(value, PaddedHeads) and relative(value.weight, weight) > 0.1  # it is another basis
        assert isinstance(model.get_submodule(f"{layer.name}.{part.output}"), PickedHeads)


def test_biases_of_values_and_output():
    model = tiny.build("llama-gqa", attention_bias=True, mlp_bias=True).double()
    before = model(WINDOWS).logits
    described = describe_layers(model)
    part = parts_of(model.get_submodule(described[0].name), described[0])
    plan = {f"{layer.name}.{name}": DENSE for layer in described for name in layer.linears()}
    plan |= {f"{layer.name}.{name}": Channels(part.head_dim) for layer in described for name in part.attention}
    plan |= {f"{layer.name}.{name}": Channels(part.channels) for layer in described for name in part.mlp}
    assert relative(narrowed(model, 1.0, plan=plan)[1](WINDOWS).logits, before) < 1e-10


@pytest.mark.parametrize("width", [1, 5, HEAD_DIM])
def test_values_lose_the_discarded_eigenvalues(width):
    x, weight, bias = rand(200, 40), rand(HEADS * HEAD_DIM, 40, seed=1), rand(HEADS * HEAD_DIM, seed=2)
    values = F.linear(x, weight, bias)
    bases, lost = head_axes(value_moment(values, HEADS), width)
    narrow = F.linear(x, *project_values(weight, bias, bases)).unflatten(-1, (HEADS, width))
    back = torch.einsum("thw,hdw->thd", narrow, bases)
    error = (back - values.unflatten(-1, (HEADS, HEAD_DIM))).square().sum((0, 2))
    assert torch.allclose(error, lost, rtol=1e-9, atol=1e-9 * values.square().sum().item())
    assert relative(bases.mT @ bases, torch.eye(width, dtype=torch.float64).expand(HEADS, -1, -1)) < 1e-12


def test_output_reads_the_basis_of_its_group():
    """Three query heads for each head of the values."""
    weight, bases = rand(10, 3 * HEADS * HEAD_DIM), head_axes(value_moment(rand(99, HEADS * HEAD_DIM), HEADS), 4)[0]
    narrow = absorb_bases(weight, bases).unflatten(1, (3 * HEADS, 4))
    for head in range(3 * HEADS):
        columns = weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM]
        assert relative(narrow[:, head], columns @ bases[head // 3]) < 1e-12


def test_leverage_is_the_diagonal_of_the_ridge_projection():
    moment = gram_of(correlated(12, 30, 4))
    expected = (moment @ torch.linalg.inv(moment + 0.7 * torch.eye(12, dtype=torch.float64))).diagonal()
    assert relative(leverage_scores(moment, 0.7), expected) < 1e-10
    assert most_telling(torch.tensor([0.1, 0.9, 0.3, 0.9]), 2).tolist() == [1, 3]


def test_compensation_is_the_least_squares_fit():
    z, weight, kept = correlated(20, 300, 5), rand(7, 20), torch.tensor([1, 4, 5, 11, 19])
    moment = gram_of(z)
    found = compensated(weight, weight @ moment, moment, kept=kept, damping=0.0)
    expected = torch.linalg.lstsq(z[kept].T, (weight @ z).T).solution.T
    assert relative(found, expected) < 1e-9


def test_selection_with_compensation_beats_dropping():
    z, weight, kept = correlated(40, 500, 6), rand(9, 40), 12
    moment = gram_of(z)
    chosen = most_telling(leverage_scores(moment, 1.0), kept)
    errors = {
        "compensated": compensated(weight, weight @ moment, moment, kept=chosen, damping=1e-6) @ z[chosen] - weight @ z,
        "dropped": weight[:, chosen] @ z[chosen] - weight @ z,
        "largest": weight[:, (top := moment.diagonal().topk(kept).indices)] @ z[top] - weight @ z,
    }
    size = {name: (error.norm() / (weight @ z).norm()).item() for name, error in errors.items()}
    assert size["compensated"] < 0.2 * min(size["dropped"], size["largest"])


def test_dead_channels_keep_their_weights():
    z = correlated(10, 50, 10)
    z[3] = 0
    weight, moment = rand(4, 10), gram_of(z)
    everything = torch.arange(10)
    assert relative(compensated(weight, weight @ moment, moment, kept=everything, damping=1e-6), weight) < 1e-12


@pytest.mark.parametrize(("heads", "width"), [(4, 3), (4, 4), (1, 9)])
def test_narrow_layers_are_their_dense_forms(heads, width):
    features = heads * (4 if heads > 1 else 12)
    padded = PaddedHeads(20, features, heads, width, dtype=torch.float64).requires_grad_(False)
    picked = PickedHeads(features, 20, heads, width, dtype=torch.float64).requires_grad_(False)
    for seed, parameter in enumerate((padded.weight, padded.bias, picked.weight, picked.bias)):
        parameter.copy_(rand(*parameter.shape, seed=seed))
    x, y = rand(2, 5, 20), rand(2, 5, features)
    assert relative(padded(x), F.linear(x, padded.dense_weight(), padded.dense_bias())) < 1e-12
    assert relative(picked(y), F.linear(y, picked.dense_weight(), picked.dense_bias())) < 1e-12
    with pytest.raises(ValueError, match="do not fit"):
        PaddedHeads(20, features, heads, features // heads + 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("density", [0.5, 0.7, 0.95])
def test_plans_spend_the_density_and_no_more(family, density):
    model = tiny.build(family)
    described = describe_layers(model)
    modules = modules_of(model, described)
    parts = [parts_of(model.get_submodule(layer.name), layer) for layer in described]
    plan = narrow_plan(modules, described, parts, density=density, influence=[0.4, 0.1])
    entries = narrow_entries(modules, described, parts, plan=plan)
    stored = sum(stored_as(entry, PIVOTED) for entry in entries.values()) / sum(module.numbers for module in modules)
    assert density - 0.02 < stored <= density
    first, last = (plan[f"{layer.name}.{part.down}"] for layer, part in zip(described, parts, strict=True))
    assert (first.number or parts[0].channels) > last.number


def test_a_density_below_what_stays_dense_is_refused():
    model = tiny.build("llama")
    described = describe_layers(model)
    parts = [parts_of(model.get_submodule(layer.name), layer) for layer in described]
    with pytest.raises(UsageError, match="leaves dense"):
        narrow_plan(modules_of(model, described), described, parts, density=0.2, influence=[1, 1])


@pytest.mark.parametrize("family", ["opt", "phi3"])
def test_other_layers_are_refused(family):
    model = tiny.build(family)
    described = describe_layers(model)[0]
    with pytest.raises(UsageError, match="flatllm and auto need layers with v_proj"):
        parts_of(model.get_submodule(described.name), described)


def test_more_channels_lose_less():
    errors = []
    for density in (0.6, 0.8, 0.95):
        model = tiny.build().double()
        before = model(WINDOWS).logits
        errors.append(relative(narrowed(model, density)[1](WINDOWS).logits, before))
    assert 0 < errors[2] < errors[1] < errors[0] < 1


def test_the_folder_is_the_model_and_goes_on_where_it_stopped(arguments, tmp_path, good):
    argv = arguments("m", prune="flatllm", density=0.7, save_path=tmp_path / "a", allocation="iprs")
    record = good(argv)
    folder = Path(record["path"])
    assert 0.68 < record["density"] <= 0.7 and record["kind"] == "narrow"
    model = AutoModelForCausalLM.from_pretrained(folder)
    value = model.model.layers[1].self_attn.v_proj
    assert isinstance(value, PaddedHeads) or record["ranks"]["model.layers.1.self_attn.v_proj"] is None
    logits = model(WINDOWS).logits
    cached = model.generate(WINDOWS[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(WINDOWS[:1], max_new_tokens=4, do_sample=False, use_cache=False))
    dense = model.dequantize()
    assert relative(dense(WINDOWS).logits, logits) < 1e-5

    shards = sorted(folder.glob("layer-*.safetensors"))
    stored = [path.read_bytes() for path in shards]
    (folder / "pifa.json").unlink()
    shards[1].unlink()
    good([*argv, "--resume"])
    assert [path.read_bytes() for path in shards] == stored


def test_perplexity_export_info_and_no_pivots(arguments, tmp_path, good, bad):
    path = good(arguments("m", prune="flatllm", density=0.7, save_path=tmp_path, allocation="iprs"))["path"]
    ppl = good(arguments("ppl", model_path=path))
    assert 0 < ppl["ppl"] < float("inf")
    shown = good(arguments("info", model_path=path, save_path=tmp_path))
    assert shown["density"] <= 0.7 and "narrow_out" in shown["kinds"]
    exported = good(arguments("export", model_path=path, save_path=tmp_path))["path"]
    assert "quantization_config" not in json.loads((Path(exported) / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(exported)(WINDOWS).logits
    assert relative(loaded, AutoModelForCausalLM.from_pretrained(path)(WINDOWS).logits) < 1e-4
    bad(arguments("pifa", model_path=path, save_path=tmp_path), "has no factors to pivot")


def test_flags_that_mean_nothing_here(arguments, tmp_path, bad):
    common = {"prune": "flatllm", "save_path": tmp_path}
    bad(arguments("m", **common, allocation="kl"), "takes --allocation iprs or uniform")
    bad(arguments("m", **common, allocation="iprs", reconstruct_step=1), "leave out --reconstruct_step")


def test_influence_is_saved_and_read(tmp_path):
    model = tiny.build()
    described = describe_layers(model)
    found = block_influence(model, described, WINDOWS, device=CPU, source=HeldLayers(model))
    states = model(WINDOWS, output_hidden_states=True).hidden_states
    cosine = torch.cosine_similarity(states[0].double(), states[1].double(), dim=-1)
    assert found[0] == pytest.approx((cosine.arccos() / torch.pi).mean().item(), rel=1e-6)
    write_influence(tmp_path / "bi.json", found, {})
    assert read_influence(tmp_path / "bi.json", len(described)) == found
    with pytest.raises(UsageError, match="nothing is ever overwritten"):
        write_influence(tmp_path / "bi.json", found, {})
    with pytest.raises(UsageError, match="this one has 3"):
        read_influence(tmp_path / "bi.json", 3)


def test_its_own_flags():
    own = ["--prune_method", "flatllm", "--sparsity_ratio", "30", "--nsamples", "5", "--tol", "0.96", "--save", "a"]
    options = PIFA.parse([*own, "--save_model", "b", "--bi_score", "c.json", "--DEV", "cpu"])
    assert (options.mode, options.prune, options.allocation, options.density) == ("m", "flatllm", "iprs", 0.7)
    assert (options.pruning_nsamples, options.reconstruct_nsamples) == (5, 5)
    assert (options.save_path, options.bi_score, options.old_output_factor) == ("b", "c.json", 0)
    assert PIFA.parse(["--mode", "m", "--prune", "flatllm", "--DEV", "cpu"]).allocation == "iprs"
    assert PIFA.parse([*own[:2], "--allocation", "uniform", "--DEV", "cpu"]).allocation == "uniform"


CONTRADICTIONS = {
    "step": (["--step", "1"], "give one"),
    "density": (["--density", "0.7", "--sparsity_ratio", "30"], "--sparsity_ratio and --density say the same"),
    "ratio": (["--ratio", "0.3", "--sparsity_ratio", "30"], "--sparsity_ratio and --ratio say the same"),
    "nsamples": (["--nsamples", "4", "--pruning_nsamples", "4"], "--nsamples and --pruning_nsamples"),
    "percent": (["--sparsity_ratio", "100"], "outside 0..99"),
    "prune": (["--prune", "svd"], "means --prune flatllm"),
    "cache": (["--cache_dir", "x"], "HF_HOME"),
}


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_contradictions(contradiction, bad):
    argv, word = CONTRADICTIONS[contradiction]
    bad(["--prune_method", "flatllm", *argv], word)


def test_unknown_methods(bad):
    bad(["--prune_method", "save_act"], "unknown --prune_method save_act: use one of bi, flatllm")


def test_mode_bi_writes_what_flatllm_reads(arguments, tmp_path, capsys, good):
    options = PIFA.parse(arguments("m", density=0.7, bi_score=tmp_path / "bi.json"))
    record = run_bi(options)
    assert record["influence"] == read_influence(tmp_path / "bi.json", 2)
    assert "channels of a head" in capsys.readouterr().out
    common = {"prune": "flatllm", "density": 0.7, "heldout_nsamples": options.heldout_nsamples}
    saved = good(arguments("m", **common, save_path=tmp_path / "a", bi_score=tmp_path / "bi.json"))
    measured = good(arguments("m", **common, save_path=tmp_path / "b"))
    assert saved["ranks"] == record["ranks"] == measured["ranks"]


def test_loads_where_the_repository_is_absent(arguments, tmp_path, good):
    path = good(arguments("m", prune="flatllm", density=0.7, save_path=tmp_path / "a"))["path"]
    result = elsewhere(tmp_path, "trust", path)
    assert result.returncode == 0, result.stderr
    tokens = torch.tensor([tiny.tokenizer()("two words")["input_ids"]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path).eval()(tokens).logits
    assert result.stdout.split() == [hashlib.sha256(logits.numpy().tobytes()).hexdigest()]
    unaware = elsewhere(tmp_path, "distrust", path)
    assert unaware.returncode != 0 and unaware.stdout == ""


@pytest.mark.parametrize("mix_ratio", [0.0, 0.25])
def test_layers_are_fitted_to_what_reaches_them(mix_ratio):
    """The last layer's projection, from activations collected by hand: behind its narrow attention, and dense."""
    name, dense = "model.layers.1.mlp", tiny.build().double()
    plan, model = narrowed(tiny.build().double(), 0.7, mix_ratio)
    found, original = model.get_submodule(name), dense.get_submodule(name)

    def activations(of) -> torch.Tensor:
        seen = []
        handle = of.get_submodule(f"{name}.down_proj").register_forward_hook(lambda _m, args, _y: seen.append(args[0]))
        of(WINDOWS)
        handle.remove()
        return seen[0].flatten(0, 1).T

    mixed = copy.deepcopy(model)
    mixed.set_submodule(name, copy.deepcopy(original))
    z, z_dense, weight = activations(mixed), activations(dense), original.down_proj.weight
    moment = gram_of(z)
    target = weight @ (mix_ratio * z_dense @ z.T + (1 - mix_ratio) * moment)
    kept = most_telling(leverage_scores(moment, 1.0), plan[f"{name}.down_proj"].left)
    assert relative(found.down_proj.weight, compensated(weight, target, moment, kept=kept, damping=1e-6)) < 1e-4
    assert torch.equal(found.up_proj.weight, original.up_proj.weight[kept])
    assert torch.equal(found.gate_proj.weight, original.gate_proj.weight[kept])
