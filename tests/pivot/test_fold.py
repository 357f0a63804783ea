"""pivot/fold.py, utils/junctions.py and --mode pifa --fold: the same function, with no reorder left in the MLP."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import PIFA
from component.format.linear import LowRankLinear, PIFALinear, PivotOrderLinear
from component.modes import pifa
from component.pivot.fold import permute_inputs, permute_outputs, verify
from component.pivot.pivoting import pivot
from component.pivot.shards import foldable, note_entries, pivot_tensors
from tests import tiny
from tests.tiny import rand, relative
from utils.errors import RunError
from utils.junctions import Junction, LayerProbe, Skeleton

WIDTH, CHANNELS = 64, 96  # of the tiny models' MLP
GATED = Junction(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
LAYER = "model.layers.1"
PROMPT = tiny.token_windows(2, 24)


def in_layer(name: str, junction: Junction) -> Junction:
    return Junction(tuple(f"{name}.{producer}" for producer in junction.producers), f"{name}.{junction.consumer}")


JUNCTION = in_layer(LAYER, GATED)


def low_rank(d_out: int, d_in: int, rank: int, seed: int, bias: bool = False) -> LowRankLinear:
    u, v, b = rand(d_out, rank, seed=3 * seed), rand(rank, d_in, seed=3 * seed + 1), rand(d_out, seed=3 * seed + 2)
    return LowRankLinear.from_factors(u, v, b if bias else None, torch.float64).requires_grad_(False)


def dense(d_out: int, d_in: int, seed: int, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(d_in, d_out, bias, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(rand(d_out, d_in, seed=seed))
        if bias:
            layer.bias.copy_(rand(d_out, seed=seed + 1))
    return layer.requires_grad_(False)


def rebuilt(tensors: dict[str, torch.Tensor], name: str) -> nn.Module:
    """The linear that these tensors store, built by hand."""
    bias = tensors.get(f"{name}.bias")
    if f"{name}.perm" not in tensors:
        layer = nn.Linear(*reversed(tensors[f"{name}.weight"].shape), bias is not None, dtype=torch.float64)
        layer.load_state_dict({"weight": tensors[f"{name}.weight"], **({} if bias is None else {"bias": bias})})
        return layer.requires_grad_(False)
    parts = (tensors[f"{name}.{key}"] for key in ("pivot.weight", "coeff.weight", "perm"))
    return PIFALinear.from_pivots(*parts, bias, torch.float64).requires_grad_(False)


def mlp(layers, x: torch.Tensor) -> torch.Tensor:
    """What LLaMA's MLP computes."""
    gate, up, down = (layers[name] for name in (*JUNCTION.producers, JUNCTION.consumer))
    return down(nn.functional.silu(gate(x)) * up(x))


@pytest.fixture(scope="module")
def probe():
    return Skeleton(tiny.build().config).probe_of([f"{LAYER}.mlp.up_proj"])


# ---------------------------------------------------------------- what can be folded, by looking


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_junctions_of_every_family(family):
    """OPT's MLP has one producer; Phi-3 computes gate and up in one linear, whose halves meet: nothing to fold."""
    expected = [GATED]
    if family == "opt":
        expected = [Junction(("fc1",), "fc2")]
    elif family == "phi3":
        expected = []
    model = tiny.build(family)
    skeleton = Skeleton(model.config)
    for name in skeleton.layers:
        assert skeleton.probe_of([f"{name}.x"]).junctions == [in_layer(name, junction) for junction in expected]


def test_attention_with_one_head_and_no_rotation_is_a_junction():
    """Scores are invariant under a common permutation of q and k, and v's channels travel on as they are."""
    skeleton = Skeleton(tiny.build("opt", num_attention_heads=1).config)
    found = skeleton.probe_of(["model.decoder.layers.0.fc1"]).junctions
    assert [(set(j.producers), j.consumer) for j in found] == [
        ({f"model.decoder.layers.0.self_attn.{n}_proj" for n in "qkv"}, "model.decoder.layers.0.self_attn.out_proj"),
        ({"model.decoder.layers.0.fc1"}, "model.decoder.layers.0.fc2"),
    ]


class Block(nn.Module):
    """A layer whose middle is `between`, called on the outputs of gate and up and on the layer's input."""

    def __init__(self, between):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm, self.between = nn.LayerNorm(12), between
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return x + self.down(self.between(self, self.gate(x), self.up(x), x))


@pytest.mark.parametrize(
    ("between", "producers"),
    [
        (lambda block, gate, up, x: torch.tanh(gate) + up**2, ("a.gate", "a.up")),
        (lambda block, gate, up, x: gate.relu() * up.sum(), ("a.gate", "a.up")),  # a sum over channels sees no order
        (lambda block, gate, up, x: block.norm(gate * up), None),  # a weight per channel
        (lambda block, gate, up, x: gate * up.flip(-1), None),
        (lambda block, gate, up, x: gate * up + gate.cumsum(-1), None),
        (lambda block, gate, up, x: (gate * up)[..., torch.arange(12) // 2], None),
        (lambda block, gate, up, x: gate * up + x.sum(-1, keepdim=True), ("a.gate", "a.up")),
        (lambda block, gate, up, x: gate * up + torch.cat([x, x[..., :4]], -1), None),  # channels of another kind join
        (lambda block, gate, up, x: up, ("a.up",)),
    ],
)
def test_only_what_carries_every_permutation_is_a_junction(between, producers):
    found = LayerProbe("a", Block(between), rand(1, 5, 8), keywords={}).junctions
    assert found == ([] if producers is None else [Junction(producers, "a.down")])


def test_outputs_that_go_elsewhere_too_are_not_folded():
    class Leaking(Block):
        def forward(self, x):
            gate = self.gate(x)
            return x + self.down(gate.relu() * self.up(x)) + gate[..., :8]

    assert LayerProbe("a", Leaking(None), rand(1, 5, 8), keywords={}).junctions == []


def test_a_linear_that_is_called_twice_is_not_folded():
    assert LayerProbe("a", Block(lambda b, gate, up, x: gate * b.up(x + 1)), rand(1, 5, 8), keywords={}).junctions == []


# ---------------------------------------------------------------- the permutation


@pytest.mark.parametrize("make", [dense, lambda m, n, seed, bias: low_rank(m, n, 5, seed, bias)])
@pytest.mark.parametrize("bias", [True, False])
def test_permuted_sides_are_the_permuted_matrix(make, bias):
    order = torch.randperm(9, generator=torch.Generator().manual_seed(7))
    x = rand(4, 9, seed=8)
    outputs, inputs = make(9, 9, 1, bias), make(9, 9, 1, bias)
    expected = outputs(x)
    permute_outputs(outputs, order)
    permute_inputs(inputs, order)
    torch.testing.assert_close(outputs(x), expected[:, order])
    torch.testing.assert_close(inputs(x[:, order]), expected)


def pivoted(layers: dict[str, nn.Module], probe) -> tuple[dict[str, nn.Module], dict[str, dict]]:
    """What --mode pifa makes of these linears, in float64, and their entries in the config."""
    entries = {name: {"kind": "lowrank" if isinstance(m, LowRankLinear) else "dense"} for name, m in layers.items()}
    tensors = {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.state_dict().items()}
    stored = pivot_tensors(tensors, entries, device=torch.device("cpu"), dtype=torch.float64, probe=probe)
    note_entries(entries, stored, foldable(probe, entries))
    return {name: rebuilt(stored, name) for name in layers}, entries


def members(gate: int | None, up: int | None, down: int | None, bias: bool = False) -> dict[str, nn.Module]:
    """The linears of the junction at these ranks; None is dense."""
    shapes = [(CHANNELS, WIDTH, gate), (CHANNELS, WIDTH, up), (WIDTH, CHANNELS, down)]
    names = [*JUNCTION.producers, JUNCTION.consumer]
    return {
        name: dense(m, n, seed, bias) if rank is None else low_rank(m, n, rank, seed, bias)
        for seed, (name, (m, n, rank)) in enumerate(zip(names, shapes, strict=True))
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("down", [None, 21])
@pytest.mark.parametrize(
    ("gate", "up"), [(20, 20), (13, 29), (29, 13), (64, 30), (64, 64), (None, 20), (20, None), (None, None)]
)
def test_the_mlp_is_the_same_function_without_a_reorder(gate, up, down, bias, probe):
    """For every kind of member and for unequal ranks."""
    layers = members(gate, up, down, bias)
    after, entries = pivoted(layers, probe)
    x = rand(7, WIDTH, seed=40)
    assert relative(mlp(after, x), mlp(layers, x)) < 1e-10
    identity = torch.arange(CHANNELS, dtype=torch.int32)
    for name, rank in zip(JUNCTION.producers, (gate, up), strict=True):
        assert entries[name]["kind"] == ("dense" if rank is None else "pifa")
        assert rank is None or (entries[name]["rank"] == rank and torch.equal(after[name].perm, identity))


def test_folding_moves_channels(probe):
    """Without it each producer has a perm of its own."""
    after, _ = pivoted(members(20, 20, 21), None)
    assert not torch.equal(after[JUNCTION.producers[0]].perm, after[JUNCTION.producers[1]].perm)


def test_a_deficient_producer_is_folded_at_its_own_rank(probe):
    layers = members(20, 20, 21)
    gate, up = JUNCTION.producers
    layers[up].u.weight[:, 3] = layers[up].u.weight[:, :3].sum(dim=1)
    after, entries = pivoted(layers, probe)
    assert (entries[gate]["rank"], entries[up]["rank"]) == (20, 19)
    assert all(torch.equal(after[n].perm, torch.arange(CHANNELS, dtype=torch.int32)) for n in JUNCTION.producers)
    x = rand(7, WIDTH, seed=40)
    assert relative(mlp(after, x), mlp(layers, x)) < 1e-10


def test_producers_without_pivots_in_common_keep_one_reorder(probe, caplog):
    """gate lives in the first channels and up in the last: no set of pivots serves both."""
    layers = members(20, 12, 21, bias=True)
    gate, up = JUNCTION.producers
    layers[gate].u.weight[CHANNELS // 2 :] = 0
    layers[up].u.weight[: CHANNELS // 2] = 0
    after, entries = pivoted(layers, probe)
    assert "no good pivots in common" in caplog.text
    assert torch.equal(after[gate].perm, torch.arange(CHANNELS, dtype=torch.int32))  # that of the higher rank
    assert not torch.equal(after[up].perm, after[gate].perm)
    sides = [entries[name].get("folded") for name in (gate, up, JUNCTION.consumer)]
    assert sides == [["outputs"], None, ["inputs"]]  # up still has to be put in order
    x = rand(7, WIDTH, seed=40)
    assert relative(mlp(after, x), mlp(layers, x)) < 1e-10


def test_a_junction_with_a_linear_that_is_not_listed_is_left_alone(probe):
    layers = members(20, 20, 21)
    unlisted = layers.pop(JUNCTION.consumer)
    after, entries = pivoted(layers, probe)
    assert not any("folded" in entry for entry in entries.values())
    x = rand(7, WIDTH, seed=40)
    assert (
        relative(mlp({**after, JUNCTION.consumer: unlisted}, x), mlp({**layers, JUNCTION.consumer: unlisted}, x))
        < 1e-10
    )


def test_a_wrong_fold_is_found(probe):
    layers = members(20, 20, None)
    after, _ = pivoted(layers, probe)
    permute_inputs(after[JUNCTION.consumer], torch.arange(CHANNELS).roll(1))
    with pytest.raises(RunError, match="down_proj changed its output by"):
        verify(probe, JUNCTION, before=layers, after=after)


# ---------------------------------------------------------------- the folder


def options_for(argv: list[str], fold: bool):
    options = PIFA.parse(argv)
    options.fold = fold
    return options


def fold_checkpoint(arguments, source: Path, parent: Path, **changes) -> Path:
    argv = arguments("pifa", model_path=source, save_path=parent, **changes)
    return Path(pifa.run(options_for(argv, fold=True))["path"])


@pytest.fixture(scope="module")
def folded(arguments, compressed, tmp_path_factory) -> Path:
    return fold_checkpoint(arguments, compressed, tmp_path_factory.mktemp("folded"))


def loaded(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(PROMPT, use_cache=False).logits


def test_the_folder_loads_as_the_same_model(folded, compressed, pivoted):
    model = loaded(folded)
    assert relative(logits(model), logits(loaded(compressed))) < 1e-4  # stored in float32
    assert relative(logits(model), logits(loaded(pivoted))) < 1e-4
    assert folded.name == f"{pivoted.name}-fold"


def test_no_reorder_is_left_in_the_mlp_and_attention_is_untouched(folded, pivoted):
    folded_tensors, plain = tiny.stored_tensors(folded), tiny.stored_tensors(pivoted)
    assert folded_tensors.keys() == plain.keys()
    for name, tensor in folded_tensors.items():
        if name.endswith(("gate_proj.perm", "up_proj.perm")):
            assert torch.equal(tensor, torch.arange(CHANNELS, dtype=torch.int32))
        elif ".mlp." not in name or "down_proj.coeff" in name or "down_proj.perm" in name:
            assert torch.equal(tensor, plain[name]), name  # a permutation of inputs does not touch pivots


def test_folded_outputs_are_not_put_in_order(folded):
    """The layer never reads its perm: one that would scramble the outputs changes nothing."""
    model = loaded(folded)
    expected = logits(model)
    for name in ("gate_proj", "up_proj"):
        layer = model.get_submodule(f"model.layers.0.mlp.{name}")
        layer.perm.copy_(layer.perm.flip(0))
    assert torch.equal(logits(model), expected)
    layer.pivot.register_forward_hook(lambda _module, _args, output: 0 * output)
    assert relative(logits(model), expected) > 1e-3  # hooks of the parts are called


def test_a_folded_layer_with_biases_and_hooks_is_the_plain_one():
    layers = members(20, 20, None, bias=True)
    up = PIFALinear.from_pivots(
        *pivot(*(layers[JUNCTION.producers[1]].get_submodule(n).weight for n in "uv")), None, torch.float64
    )
    folded = PivotOrderLinear(WIDTH, CHANNELS, 20, True, dtype=torch.float64)
    folded.load_state_dict({**up.state_dict(), "bias": rand(CHANNELS, seed=9)})
    x = rand(7, WIDTH, seed=40)
    expected = torch.cat([up.pivot(x), up.coeff(up.pivot(x))], dim=-1) + rand(CHANNELS, seed=9)
    torch.testing.assert_close(folded(x), expected)
    folded.pivot.register_forward_hook(lambda _module, _args, output: 2 * output)
    torch.testing.assert_close(folded(x), 2 * expected - rand(CHANNELS, seed=9))


def test_the_config_says_what_is_folded(folded, pivoted):
    entries, plain = (
        json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
        for folder in (folded, pivoted)
    )
    for name, entry in entries.items():
        side = {"gate_proj": ["outputs"], "up_proj": ["outputs"], "down_proj": ["inputs"]}.get(name.split(".")[-1])
        assert entry.get("folded") == side
        assert {key: value for key, value in entry.items() if key != "folded"} == plain[name]


def test_density_is_that_of_the_plain_folder(folded, pivoted):
    new, old = (json.loads((folder / "pifa.json").read_text()) for folder in (folded, pivoted))
    assert {k: v for k, v in new.items() if "density" in k} == {k: v for k, v in old.items() if "density" in k}


def test_dequantize_gives_the_same_function(folded):
    model = loaded(folded)
    expected = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(module, PIFALinear) for module in dense.modules())
    assert relative(logits(dense), expected) < 1e-10


def test_two_runs_and_a_resumed_one_give_the_same_bytes(folded, arguments, compressed, tmp_path):
    again = fold_checkpoint(arguments, compressed, tmp_path)
    without = ("pifa.json",)
    assert tiny.contents(again, without) == tiny.contents(folded, without)
    (again / "pifa.json").unlink()  # as if it had stopped just before its end
    (again / "layer-00001.safetensors").unlink()
    resumed = fold_checkpoint(arguments, compressed, tmp_path, resume=True)
    assert resumed == again and tiny.contents(again, without) == tiny.contents(folded, without)


def test_biases_and_dense_members_in_a_real_folder(arguments, tmp_path):
    """Qwen2-like, with biases; a plan that keeps one producer dense in the first layer and gives unequal ranks."""
    model = tiny.save_model(tmp_path / "a", tiny.build("qwen2"))
    first = PIFA.run(arguments("m", model=model, save_path=tmp_path))
    plan = json.loads((Path(first["path"]) / "plan.json").read_text())
    plan["layers"] |= {
        "model.layers.0.mlp.gate_proj": "dense", "model.layers.0.mlp.up_proj": 17,
        "model.layers.1.mlp.gate_proj": 12, "model.layers.1.mlp.up_proj": 33, "model.layers.1.mlp.down_proj": "dense",
    }  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    argv = arguments("m", model=model, save_path=tmp_path, allocation=tmp_path / "plan.json", density=0.9)
    source = Path(PIFA.run(argv)["path"])
    folder = fold_checkpoint(arguments, source, tmp_path)
    assert relative(logits(loaded(folder)), logits(loaded(source))) < 1e-4


def test_a_model_without_junctions_says_so(arguments, tmp_path, caplog):
    model = tiny.save_model(tmp_path / "a", tiny.build("phi3"))
    source = Path(PIFA.run(arguments("m", model=model, save_path=tmp_path))["path"])
    folder = fold_checkpoint(arguments, source, tmp_path)
    assert "nothing was folded" in caplog.text
    assert relative(logits(loaded(folder)), logits(loaded(source))) < 1e-4
