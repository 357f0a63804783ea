"""--prune auto: narrower blocks beside factors, what they are predicted to lose, and that the best on held-out wins."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import component.compress.pipeline
import PIFA
from component.channels.by_output import (
    channel_curve,
    channel_order,
    head_blocks,
    head_curve,
    head_directions,
    head_metric,
    narrow_output,
    reading_axes,
)
from component.channels.flatllm import absorb_bases, compensated
from component.channels.mixing import Mixing
from component.channels.parts import parts_of
from component.checkpoint.counting import stored_as
from component.checkpoint.entries import kind_of
from component.compress.auto_planner import FORMS, MIXED, AutoPlanner
from component.compress.measuring import Profiling, profile_layers
from component.flow.means import Flows, Means
from component.flow.streaming import Compression, compress_layers
from component.format.linear import LowRankLinear, PIFALinear
from component.format.narrow import PaddedHeads, PickedHeads
from component.ranks.budget import Budget, Module
from component.ranks.by_loss import Block, by_loss, by_loss_and_form
from component.ranks.cost import PIVOTED
from component.ranks.sizes import DENSE, Channels, Rank
from component.solve.solvers import make_solver
from tests import tiny
from tests.tiny import gram_of, rand, relative
from utils.layers import HeldLayers, describe_layers

CPU = torch.device("cpu")
WINDOWS = tiny.token_windows(6, 24)
HEADS, QUERY_HEADS, HEAD_DIM = 2, 4, 8


def mixed(model, ranks, mix_ratio=0.25, ridge=1e-6):
    """(plan, the model with its layers made by Mixing). ranks(name): Rank, Channels or DENSE of a linear."""
    described = describe_layers(model)
    parts = {layer.name: parts_of(model.get_submodule(layer.name), layer) for layer in described}
    plan = {f"{layer.name}.{name}": ranks(name) for layer in described for name in layer.linears()}
    solver = make_solver("auto", None, mix_ratio, drift_ratio=0.5, ridge=ridge)
    how = Mixing(parts, damping=ridge, weighting=None)
    flows, means = Flows(WINDOWS, whitening=6, reconstruction=6), Means(CPU, HeldLayers(model), batch=2)
    compression = Compression(plan, solver, dtype=model.dtype, layer_solver=how)
    layers = list(compress_layers(model, described, compression, flows=flows, means=means))
    for index, layer in layers:
        model.set_submodule(described[index].name, layer)
    return plan, model


# ---------------------------------------------------------------- the algebra


def test_a_single_head_in_the_metric_of_its_reader_is_the_truncated_product():
    """Eckart-Young: no rank-w product loses less than O L cut to w."""
    z, weight, width = rand(HEAD_DIM, 200) * torch.arange(1, 9)[:, None], rand(20, HEAD_DIM, seed=1), 3
    moment = gram_of(z)
    bases = reading_axes(moment[None], head_metric(weight, query_heads=1, heads=1), width)
    fitted = narrow_output(weight, weight @ moment, moment, bases=bases, damping=0.0)
    error = (fitted @ bases[0].T @ z - weight @ z).square().sum()
    singular = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment))
    assert error.item() == pytest.approx(singular[width:].square().sum().item(), rel=1e-6)


def test_without_a_metric_it_is_pca():
    moment = gram_of(rand(HEAD_DIM, 50) * torch.arange(1, 9)[:, None])[None]
    decode, encode = head_directions(moment, torch.eye(HEAD_DIM, dtype=torch.float64)[None])
    assert relative(decode @ encode, torch.eye(HEAD_DIM, dtype=torch.float64)[None]) < 1e-9
    axes = torch.linalg.eigh(moment[0])[1].flip(-1)[:, :3]
    bases = reading_axes(moment, torch.eye(HEAD_DIM, dtype=torch.float64)[None], 3)[0]
    assert relative(bases @ bases.T, axes @ axes.T) < 1e-6


def test_blocks_and_metric_are_sums_over_the_query_heads_of_one():
    z, weight = rand(QUERY_HEADS * HEAD_DIM, 40), rand(9, QUERY_HEADS * HEAD_DIM, seed=1)
    blocks = head_blocks(gram_of(z), query_heads=QUERY_HEADS, heads=HEADS)
    metric = head_metric(weight, query_heads=QUERY_HEADS, heads=HEADS)
    for head in range(HEADS):
        own = [slice(q * HEAD_DIM, (q + 1) * HEAD_DIM) for q in (2 * head, 2 * head + 1)]
        assert relative(blocks[head], sum(gram_of(z[one]) for one in own)) < 1e-12
        assert relative(metric[head], sum(weight[:, one].T @ weight[:, one] for one in own)) < 1e-12


def test_channels_go_as_the_fit_without_them_says():
    """The first to go is the one whose removal, with all others fitted again, loses least; seen by trying all."""
    z, weight = rand(12, 4) @ rand(4, 90, seed=1) + 0.3 * rand(12, 90, seed=2), rand(7, 12, seed=3)
    moment = gram_of(z)
    losses = []
    for out in range(12):
        kept = torch.tensor([i for i in range(12) if i != out])
        fitted = compensated(weight, weight @ moment, moment, kept=kept, damping=1e-9)
        losses.append((fitted @ z[kept] - weight @ z).square().sum().item())
    order = channel_order(weight, moment, 1e-9)
    assert order[-1] == min(range(12), key=losses.__getitem__)
    assert sorted(order.tolist()) == list(range(12))


@pytest.mark.parametrize("weighted", [False, True])
def test_curves_are_the_losses_of_what_is_left(weighted):
    """1/2 E (g . dy)^2 with dy from the channels that are kept, fitted to the same tokens."""
    n, tokens = QUERY_HEADS * HEAD_DIM, 300
    z, weight, g = rand(n, n) @ rand(n, tokens, seed=1), rand(9, n, seed=2), rand(tokens, 9, seed=3)
    moment, weighting = gram_of(z), torch.linalg.cholesky(gram_of(rand(9, 20, seed=4))) if weighted else None
    seen = weight if weighting is None else weighting.T @ weight
    curve = channel_curve(weight, moment, inputs=z.T, gradients=g, weighting=weighting, tokens=10**9)
    order = channel_order(seen, moment, 1e-3)
    for kept in (1, 13, n - 1):
        chosen = order[:kept].sort().values
        fitted = compensated(weight, weight @ moment, moment, kept=chosen, damping=1e-3)
        error = fitted @ z[chosen] - weight @ z
        # the ridge of the curve is of all channels, that of the fit of those that are left
        assert curve[kept].item() == pytest.approx((g.T * error).sum(0).square().mean().item() / 2, rel=0.1)
    assert curve[n] == 0
    few = channel_curve(weight, moment, inputs=z.T, gradients=g, weighting=weighting, tokens=tokens)
    assert relative(few[:n] * (1 - torch.arange(n) / tokens) ** 2, curve[:n]) < 1e-6 and few[n] == 0
    assert (
        channel_curve(weight, moment, inputs=z.T, gradients=g, weighting=weighting, tokens=5)[5:n] > 1e5 * curve[5:n]
    ).all()
    curve = head_curve(
        weight, moment, inputs=z.T, gradients=g, weighting=weighting, query_heads=QUERY_HEADS, heads=HEADS
    )
    blocks, metric = (
        head_blocks(moment, query_heads=QUERY_HEADS, heads=HEADS),
        head_metric(seen, query_heads=QUERY_HEADS, heads=HEADS),
    )
    decode, encode = head_directions(blocks, metric)
    for width in (0, 3, HEAD_DIM - 1):
        back = (decode[:, :, :width] @ encode[:, :width]).repeat_interleave(2, 0)
        left = torch.einsum("qde,qet->qdt", back, z.unflatten(0, (QUERY_HEADS, -1))).flatten(0, 1)
        expected = (g.T * (weight @ (left - z))).sum(0).square().mean().item() / 2
        assert curve[width].item() == pytest.approx(expected, rel=1e-3)
    assert curve[HEAD_DIM] == 0


def test_fitting_heads_to_all_tokens_loses_no_more_than_absorbing():
    z, weight = rand(QUERY_HEADS * HEAD_DIM, 20) @ rand(20, 300, seed=1), rand(9, QUERY_HEADS * HEAD_DIM, seed=2)
    moment = gram_of(z)
    metric = head_metric(weight, query_heads=QUERY_HEADS, heads=HEADS)
    bases = reading_axes(head_blocks(moment, query_heads=QUERY_HEADS, heads=HEADS), metric, 3)
    narrow = torch.einsum("hdw,hqdt->hqwt", bases, z.unflatten(0, (HEADS, -1, HEAD_DIM))).flatten(0, 2)
    fitted, absorbed = (
        narrow_output(weight, weight @ moment, moment, bases=bases, damping=1e-9),
        absorb_bases(weight, bases),
    )
    errors = [(one @ narrow - weight @ z).norm().item() for one in (fitted, absorbed)]
    assert errors[0] < errors[1]


# ---------------------------------------------------------------- the plan

MODULES = [Module(name, 40, 40, attention=False) for name in ("a", "b", "c", "q")]
BLOCK = ("a", "b", "c")


def falling(start: float, count: int) -> list[float]:
    return [start * (1 - i / count) ** 2 for i in range(count + 1)]


@pytest.mark.parametrize(("start", "narrow"), [(1e-9, True), (1e9, False)])
def test_the_form_that_loses_less_is_taken_within_the_budget(start, narrow):
    budget = Budget(MODULES, 0.7, PIVOTED, curves={m.name: falling(1.0, 40) for m in MODULES})
    plan = by_loss_and_form(budget, [Block(BLOCK, falling(start, 40))])
    assert [isinstance(plan[name], Channels) for name in BLOCK] == [narrow] * 3
    assert list(plan) == [m.name for m in MODULES]
    if narrow:
        assert len({plan[name] for name in BLOCK}) == 1
        spent = 3 * 40 * plan["a"].left + PIVOTED.stored(plan["q"].number, 40, 40)
        assert 0.65 * 6400 < spent <= 0.7 * 6400
    else:
        assert plan == by_loss(budget)


def test_channels_come_in_multiples_too():
    budget = Budget(MODULES, 0.7, PIVOTED, curves={m.name: falling(1.0, 40) for m in MODULES}, rank_multiple=8)
    plan = by_loss_and_form(budget, [Block(BLOCK, falling(1e-9, 40))])
    assert isinstance(plan["a"], Channels) and plan["a"].left % 8 == 0


def test_a_price_can_have_one_block_narrow_and_another_not():
    modules = [Module(f"{block}.{name}", 40, 40, attention=False, layer=block) for block in (0, 1) for name in BLOCK]
    budget = Budget(modules, 0.6, PIVOTED, curves={m.name: falling(1.0, 40) for m in modules})
    blocks = [Block(tuple(f"{i}.{n}" for n in BLOCK), falling(loss, 40)) for i, loss in enumerate((0.5, 50.0))]
    plan = by_loss_and_form(budget, blocks)
    assert isinstance(plan["0.a"], Channels) and not isinstance(plan["1.a"], Channels)


# ---------------------------------------------------------------- in the model


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "qwen2", "qwen3", "mistral"])
def test_all_channels_beside_full_ranks_give_the_dense_model(family):
    model = tiny.build(family).double()
    before = model(WINDOWS).logits
    part = parts_of(model.model.layers[0], describe_layers(model)[0])
    counts = {part.value: Channels(part.head_dim), part.output: Channels(part.head_dim)}
    counts |= dict.fromkeys(part.mlp, Channels(part.channels))
    _, model = mixed(model, lambda name: counts.get(name, DENSE))
    assert relative(model(WINDOWS).logits, before) < 1e-10
    assert isinstance(model.model.layers[1].self_attn.v_proj, PaddedHeads)
    assert isinstance(model.model.layers[1].self_attn.o_proj, PickedHeads)


def test_factors_and_channels_in_one_layer():
    def ranks(count, name):
        heads = dict.fromkeys(("v_proj", "o_proj"), Channels(count))
        return {"q_proj": Rank(30), "k_proj": Rank(20), **heads}.get(name.rsplit(".")[-1], Rank(40))

    errors = []
    for count in (5, 11, 15):
        model = tiny.build().double()
        before = model(WINDOWS).logits
        _, model = mixed(model, partial(ranks, count))
        errors.append(relative(model(WINDOWS).logits, before))
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, LowRankLinear) and isinstance(layer.mlp.up_proj, LowRankLinear)
    assert isinstance(layer.self_attn.v_proj, PaddedHeads) and errors[2] < errors[1] < errors[0] < 1


def test_the_last_projection_is_fitted_to_what_reaches_it():
    """The target that factors have: the mixture of the flows, and half of the drift of the stream."""

    def ranks(name):
        return Channels(60) if "mlp" in name else Rank(50)

    name, dense = "model.layers.1.mlp", tiny.build().double()
    _, model = mixed(tiny.build().double(), ranks, 0.25)
    found, original = model.get_submodule(name), dense.get_submodule(name)

    def states(of) -> tuple[torch.Tensor, torch.Tensor]:
        seen = {}
        places = {"z": of.get_submodule(f"{name}.down_proj"), "h": of.model.layers[1].post_attention_layernorm}
        handles = [
            one.register_forward_pre_hook(lambda _m, args, key=key: seen.update({key: args[0]}))
            for key, one in places.items()
        ]
        of(WINDOWS)
        for handle in handles:
            handle.remove()
        return seen["z"].flatten(0, 1).T, seen["h"].flatten(0, 1).T

    z_dense, h_dense = states(dense)
    model.set_submodule(name, original)
    z, h = states(model)
    moment, weight = gram_of(z), original.down_proj.weight
    target = weight @ (0.25 * z_dense @ z.T + 0.75 * moment) + 0.5 * (h_dense - h) @ z.T
    kept = channel_order(weight, moment, 1e-6)[:60].sort().values
    assert relative(found.down_proj.weight, compensated(weight, target, moment, kept=kept, damping=1e-6)) < 1e-4
    assert torch.equal(found.up_proj.weight, original.up_proj.weight[kept])


def test_the_profile_measures_what_blocks_lose():
    model = tiny.build()
    described = describe_layers(model)
    parts = [parts_of(model.get_submodule(layer.name), layer) for layer in described]
    for index, measured in profile_layers(
        model, described, Profiling(WINDOWS, CPU, seed=5, shrinkages=(None, 0.1), parts=parts)
    ):
        name, part = described[index].name, parts[index]
        curves = measured.channel_curves
        assert {key: tuple(curve.shape) for key, curve in curves.items()} == {
            f"{name}.{part.output}": (2, part.head_dim + 1),
            f"{name}.{part.down}": (2, part.channels + 1),
        }
        for curve in curves.values():
            assert (curve[:, 0] > curve[:, curve.shape[1] // 2]).all() and (curve[:, -1] == 0).all()
    for _, measured in profile_layers(model, described, Profiling(WINDOWS, CPU, seed=5)):
        assert measured.channel_curves == {}


# ---------------------------------------------------------------- through the front door

AUTO = {"prune": "auto", "density": 0.7, "heldout_nsamples": 8}


@pytest.fixture(scope="module")
def auto_run(arguments, tmp_path_factory):
    return PIFA.run(arguments("m", save_path=tmp_path_factory.mktemp("auto"), **AUTO))


def forced(monkeypatch, form: str) -> None:
    """As if held-out text had said that this form is the best."""
    monkeypatch.setattr(AutoPlanner, "kinds", lambda _self, start: [replace(start, form=form)])


@pytest.fixture(scope="module")
def mixed_folder(arguments, tmp_path_factory) -> Path:
    """Not to be written to."""
    with pytest.MonkeyPatch.context() as patch:
        forced(patch, MIXED)
        return Path(PIFA.run(arguments("m", save_path=tmp_path_factory.mktemp("mixed"), **AUTO))["path"])


def entries_of(folder: Path) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["layers"]


def test_the_best_form_on_held_out_text_is_written(auto_run, arguments, text_file, tmp_path):
    judged = {entry["form"]: entry["heldout_ppl"] for entry in auto_run["tuned"]}
    assert list(judged) == list(FORMS)
    assert auto_run["form"] == min(judged, key=judged.__getitem__)
    (tmp_path / "last.txt").write_text(text_file.read_text()[-8 * 32 :])
    found = PIFA.run(arguments("ppl", model_path=auto_run["path"], dataset=tmp_path / "last.txt"))
    assert found["ppl"] == pytest.approx(min(judged.values()), rel=1e-4)


def test_its_parts_are_what_they_are_alone(auto_run, arguments, text_file, tmp_path):
    """The held-out perplexities of the two parts are those of the runs that make them."""
    judged = {entry["form"]: entry["heldout_ppl"] for entry in auto_run["tuned"]}
    (tmp_path / "last.txt").write_text(text_file.read_text()[-8 * 32 :])
    for form in FORMS[:2]:
        alone = PIFA.run(arguments("m", save_path=tmp_path, **{**AUTO, "prune": form}))
        found = PIFA.run(arguments("ppl", model_path=alone["path"], dataset=tmp_path / "last.txt"))
        assert found["ppl"] == pytest.approx(judged[form], rel=1e-4)
        assert judged[auto_run["form"]] <= judged[form]


def test_a_mixed_folder_is_the_model_and_keeps_to_the_density(mixed_folder):
    entries = entries_of(mixed_folder)
    kinds = {entry["kind"] for entry in entries.values()}
    narrow = [e for e in entries.values() if e["kind"].startswith("narrow") or "kept_in" in e or "kept_out" in e]
    assert narrow and "lowrank" in kinds and kind_of(entries) == "lowrank"
    dense = sum(entry["in_features"] * entry["out_features"] for entry in entries.values())
    assert 0.66 < sum(stored_as(entry, PIVOTED) for entry in entries.values()) / dense <= 0.7
    plan = json.loads((mixed_folder / "plan.json").read_text())["layers"]
    assert sum(isinstance(rank, dict) for rank in plan.values()) == len(narrow)
    model = AutoModelForCausalLM.from_pretrained(mixed_folder)
    logits = model(WINDOWS).logits
    cached = model.generate(WINDOWS[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(WINDOWS[:1], max_new_tokens=4, do_sample=False, use_cache=False))
    assert relative(model.dequantize()(WINDOWS).logits, logits) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_run_goes_on_with_the_form_it_chose(form, arguments, tmp_path, monkeypatch, good):
    forced(monkeypatch, form)
    argv = arguments("m", save_path=tmp_path, **AUTO)
    folder = Path(good(argv)["path"])
    shards = sorted(folder.glob("layer-*.safetensors"))
    stored = [path.read_bytes() for path in shards]
    (folder / "pifa.json").unlink()
    shards[1].unlink()
    monkeypatch.setattr(component.compress.pipeline, "choose", pytest.fail)
    good([*argv, "--resume"])
    assert [path.read_bytes() for path in shards] == stored


REFUSED = {
    "held-out": ({"heldout_nsamples": 0}, "--prune auto, --tune"),
    "allocation": ({"allocation": "uniform"}, "takes --allocation kl, not uniform"),
    "ratio": ({"attn_ratio": 0.3}, "takes --allocation kl, not type"),
    "step": ({"reconstruct_step": 2, "allocation": "kl"}, "leave out --reconstruct_step"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_flags_that_mean_nothing_here(case, arguments, tmp_path, bad):
    changes, line = REFUSED[case]
    bad(arguments("m", prune="auto", save_path=tmp_path, **changes), line)
    assert not list(tmp_path.iterdir())


def test_other_layers_are_refused(tmp_path, arguments, bad):
    folder = tiny.save_model(tmp_path / "opt", tiny.build("opt"))
    bad(arguments("m", prune="auto", model=folder, save_path=tmp_path), "flatllm and auto need layers with v_proj")


# ---------------------------------------------------------------- in the other modes


@pytest.mark.parametrize("fold", [False, True])
def test_pivoting_keeps_the_narrow_linears(fold, mixed_folder, arguments, tmp_path, good):
    record = good(arguments("pifa", model_path=mixed_folder, save_path=tmp_path, fold=fold))
    before, after = entries_of(mixed_folder), entries_of(record["path"])
    for name, entry in before.items():
        kind, other = entry["kind"], after[name]
        assert other["kind"] == "pifa" if kind == "lowrank" else other["kind"] == kind
        for key in ("heads", "width", "kept_in", "kept_out"):
            assert other.get(key) == entry.get(key)
    assert record["density"] == pytest.approx(record["density_pivoted"]) and record["density"] <= 0.7
    logits = [AutoModelForCausalLM.from_pretrained(one)(WINDOWS).logits for one in (mixed_folder, record["path"])]
    assert relative(logits[1], logits[0]) < 1e-3
    model = AutoModelForCausalLM.from_pretrained(record["path"])
    assert any(isinstance(module, PIFALinear) for module in model.modules())


def test_perplexity_info_text_and_export(mixed_folder, arguments, tmp_path, good, capsys):
    common = {"model_path": mixed_folder, "save_path": tmp_path}
    ppl = good(arguments("ppl", **common))
    assert 0 < ppl["ppl"] < float("inf")
    shown = good(arguments("info", **common))
    entries = entries_of(mixed_folder)
    assert shown["kinds"] == {k: sum(e["kind"] == k for e in entries.values()) for k in shown["kinds"]}
    narrow = next(name for name, entry in entries.items() if {"width", "kept_out", "kept_in"} & entry.keys())
    entry = entries[narrow]
    assert shown["ranks"][narrow] == next(entry[k] for k in ("width", "kept_out", "kept_in") if k in entry)
    text = good(arguments("generate", **common, prompt="abc", max_new_tokens=3, dataset=None))
    assert text["new_tokens"] == 3
    exported = good(arguments("export", **common))["path"]
    loaded = AutoModelForCausalLM.from_pretrained(exported)(WINDOWS).logits
    assert relative(loaded, AutoModelForCausalLM.from_pretrained(mixed_folder)(WINDOWS).logits) < 1e-4


def test_fine_tuning_trains_the_factors_and_leaves_the_rest(mixed_folder, arguments, text_file, tmp_path, good):
    flags = {"order": "full", "data_path": text_file, "max_steps": 2, "batch_size": 2, "cutoff_len": 32}
    argv = arguments("finetune", model_path=mixed_folder, save_path=tmp_path, learning_rate=1e-2, **flags)
    tuned = good(argv)["path"]
    before, after = tiny.stored_tensors(mixed_folder), tiny.stored_tensors(Path(tuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    factors = {f"{n}.{f}.weight" for n, e in entries_of(mixed_folder).items() if e["kind"] == "lowrank" for f in "uv"}
    assert changed == factors and before.keys() == after.keys()


@pytest.fixture(scope="module")
def flat_folder(arguments, tmp_path_factory) -> Path:
    """A checkpoint with fewer channels alone. Not to be written to."""
    argv = arguments("m", prune="flatllm", allocation="iprs", density=0.7, save_path=tmp_path_factory.mktemp("flat"))
    return Path(PIFA.run(argv)["path"])


def test_what_narrow_folders_do_not_do_is_said_in_a_line(
    mixed_folder, flat_folder, arguments, text_file, tmp_path, bad
):
    flags = {"order": "full", "data_path": text_file, "save_path": tmp_path}
    bad(arguments("finetune", model_path=flat_folder, **flags), "no factors to train")
    bad(arguments("pifa", model_path=flat_folder, save_path=tmp_path, fold=True), "has no factors to pivot")
    for folder in (mixed_folder, flat_folder):
        bad(arguments("quantize", model_path=folder, save_path=tmp_path), "has linears with fewer channels")


@pytest.mark.parametrize("which", ["mixed_folder", "flat_folder"])
def test_bench_runs_them_with_both_runners(which, arguments, tmp_path, request, good):
    folder = request.getfixturevalue(which)
    argv = arguments("bench", model_path=folder, model=None, save_path=tmp_path, bench_what="model", dtype="float32")
    rows = [row for row in good(argv)["models"] if row["row"] == folder.name]
    assert [row["runner"] for row in rows] == ["transformers", "lean runner"]
    assert not any("refused" in row for row in rows)


def test_with_refinement_a_second_pass_and_tuning(arguments, tmp_path, good):
    flags = {"refine_steps": 2, "passes": 2, "tune": 2, "profile_nsamples": 2}
    record = good(arguments("m", save_path=tmp_path, **AUTO, **flags))
    forms = [entry["form"] for entry in record["tuned"]]
    assert forms[:3] == list(FORMS) and forms[3:] == [record["form"]]
    assert record["kind"] == kind_of(entries_of(record["path"]))
