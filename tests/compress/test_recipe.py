"""compress/recipe.py: what is chosen, from what, and that the held-out perplexity is that of the finished model."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import component.compress.pipeline
import PIFA
from component.checkpoint.writer import CheckpointWriter
from component.compress.judging import held_out_perplexity
from component.compress.recipe import VALUES, Recipe, candidates, choose_recipe, tunable
from component.flow.means import Flows, Means
from component.flow.streaming import Compression, compress_layers
from component.ranks.budget import RANK_FLOOR
from component.ranks.sizes import Rank
from component.solve.solvers import make_solver
from tests import tiny
from utils.errors import RunError
from utils.layers import HeldLayers, decoder_layers, describe_layers

CPU = torch.device("cpu")
WINDOWS = tiny.token_windows(5, 24)
START = Recipe(0.25, 0.5, 0.1, 0.5, RANK_FLOOR)
NAMES = list(VALUES)


def whole_model_perplexity(model) -> float:
    with torch.no_grad():
        scores = model(WINDOWS, use_cache=False).logits[:, :-1].double()
    return F.cross_entropy(scores.flatten(0, 1), WINDOWS[:, 1:].flatten()).exp().item()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_held_out_perplexity_of_the_models_own_layers_is_the_models(family, batch):
    model = tiny.build(family, "eager")
    layers = enumerate(layer for _, layer in decoder_layers(model))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    measured = held_out_perplexity(model, layers, WINDOWS, device=CPU, batch=batch)
    assert measured == pytest.approx(whole_model_perplexity(model), rel=1e-5)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_layers_from_the_driver_are_judged_as_the_finished_model_is():
    model = tiny.build()
    described = describe_layers(model)
    plan = {f"{layer.name}.{name}": Rank(9) for layer in described for name in layer.linears()}
    flows = Flows(tiny.token_windows(4, 32, seed=1), whitening=4, reconstruction=4)
    compression = Compression(plan, make_solver("svd-llm", None, mix_ratio=0.25), dtype=torch.float32)

    def layers():
        means = Means(CPU, HeldLayers(model))
        return compress_layers(model, described, compression, flows=flows, means=means)

    measured = held_out_perplexity(model, layers(), WINDOWS, device=CPU)
    dense = whole_model_perplexity(model)
    for index, layer in layers():
        model.set_submodule(described[index].name, layer)
    assert measured == pytest.approx(whole_model_perplexity(model), rel=1e-5)
    assert abs(measured / dense - 1) > 1e-3


def test_a_held_out_loss_that_is_not_finite_ends_the_run():
    model = tiny.build()
    model.model.norm.weight[0] = float("nan")
    with pytest.raises(RunError, match="held-out windows is not finite"):
        held_out_perplexity(model, enumerate(model.model.layers), WINDOWS, device=CPU)


def changed(recipe: Recipe) -> set[str]:
    return {name for name in NAMES if getattr(recipe, name) != getattr(START, name)}


def test_candidates_are_the_start_then_single_changes_then_pairs():
    everything = candidates(START, NAMES, 10**6)
    counts = [len(changed(recipe)) for recipe in everything]
    assert counts == sorted(counts) and set(counts) == {0, 1, 2}
    assert counts.count(0) == 1 and counts.count(1) == 10
    assert len(set(everything)) == len(everything) == 1 + 10 + 10 * 4
    assert [changed(recipe) for recipe in everything[1:6]] == [{name} for name in NAMES]
    for count in (1, 3, 12):
        assert candidates(START, NAMES, count) == everything[:count]


def test_only_named_constants_change():
    assert set.union(*map(changed, candidates(START, ["drift_factor"], 99))) == {"drift_factor"}
    assert candidates(START, [], 5) == [START]


@pytest.mark.parametrize(
    ("step", "allocation", "names"),
    [
        (None, "kl", NAMES),
        (None, "uniform", NAMES[:4]),
        (2, "kl", [*NAMES[:2], "token_power", "rank_floor"]),
        (0, "kl", ["rank_floor"]),
        (0, "type", []),
    ],
)
def test_constants_without_effect_are_not_tunable(step, allocation, names):
    assert tunable(step, allocation) == names


def with_attention(density: float) -> Recipe:
    return replace(START, attention_density=density)


def test_the_best_is_taken_and_each_recipe_judged_once():
    asked = []

    def judge(recipe: Recipe) -> float:
        asked.append(recipe)
        return 10 + abs(recipe.attention_density - 0.4) + abs(recipe.drift_factor - 0.5) + recipe.old_output_factor

    recipe, tuned = choose_recipe(
        START, [with_attention(0.5), with_attention(0.4)], names=NAMES[:2], count=99, judge=judge
    )
    assert (recipe.attention_density, recipe.drift_factor, recipe.old_output_factor) == (0.4, 0.5, 0.125)
    assert len(set(asked)) == len(asked) == len(tuned)
    assert [entry["heldout_ppl"] for entry in tuned] == [judge(one) for one in list(asked)]
    assert [entry["attention_density"] for entry in tuned[:3]] == [0.5, 0.4, 0.4]
    assert min(entry["heldout_ppl"] for entry in tuned) == judge(recipe)


def test_of_equals_the_first_is_taken_and_nothing_is_judged_where_nothing_is_open():
    assert choose_recipe(START, [], names=NAMES, count=4, judge=lambda recipe: 1.0)[0] == START
    assert choose_recipe(START, [], names=NAMES, count=0, judge=pytest.fail) == (START, [])
    assert choose_recipe(START, [with_attention(0.5)], names=NAMES, count=0, judge=pytest.fail) == (
        with_attention(0.5),
        [],
    )


# ---------------------------------------------------------------- through the front door

TUNED = {"density": 0.5, "tune": 6, "allocation": "kl", "profile_nsamples": 2}


@pytest.fixture(scope="module")
def tuned_run(arguments, tmp_path_factory):
    return PIFA.run(arguments("m", save_path=tmp_path_factory.mktemp("tuned"), **TUNED))


def test_the_record_lists_the_candidates_and_names_the_best(tuned_run):
    entries = tuned_run["tuned"]
    assert [{name: entry[name] for name in NAMES} for entry in entries] == [
        {name: getattr(recipe, name) for name in NAMES} for recipe in candidates(START, NAMES, 6)
    ]
    best = min(entries, key=lambda entry: entry["heldout_ppl"])
    assert {name: tuned_run[name] for name in NAMES} == {name: best[name] for name in NAMES}
    assert all(math.isfinite(entry["heldout_ppl"]) for entry in entries)
    assert len({entry["heldout_ppl"] for entry in entries}) > 1
    assert len(list(Path(tuned_run["path"]).parent.glob("profile_*"))) == 1  # with and without weighting


def test_what_was_judged_is_what_is_written(tuned_run, arguments, text_file, tmp_path):
    """The folder's perplexity on the last 16 windows of the text, a token a letter, is that of the best candidate."""
    (tmp_path / "last.txt").write_text(text_file.read_text()[-16 * 32 :])
    judged = PIFA.run(arguments("ppl", model_path=tuned_run["path"], dataset=tmp_path / "last.txt"))
    assert judged["windows"] == tuned_run["heldout_nsamples"] == 16
    assert judged["ppl"] == pytest.approx(min(entry["heldout_ppl"] for entry in tuned_run["tuned"]), rel=1e-4)


def test_an_interrupted_run_goes_on_with_what_it_chose(tuned_run, arguments, tmp_path, monkeypatch):
    write = CheckpointWriter.write

    def interrupted(writer, shard, tensors):
        if shard == "layer-00001.safetensors" and "_kl_" in writer.folder.name:
            raise KeyboardInterrupt
        write(writer, shard, tensors)

    command = arguments("m", save_path=tmp_path, resume=True, **TUNED)
    monkeypatch.setattr(CheckpointWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PIFA.run(command)
    monkeypatch.setattr(CheckpointWriter, "write", write)
    monkeypatch.setattr(component.compress.pipeline, "choose_recipe", pytest.fail)
    record = PIFA.run(command)
    assert record["tuned"] == tuned_run["tuned"]
    shards = [tiny.contents(Path(run["path"]), ("pifa.json",)) for run in (record, tuned_run)]
    assert shards[0] == shards[1]


def test_type_without_its_ratio_takes_the_better_of_two_attention_densities(arguments, tmp_path, caplog):
    caplog.set_level("INFO", logger="pifa")
    record = PIFA.run(arguments("m", save_path=tmp_path, density=0.6, allocation="type"))
    assert [entry["attention_density"] for entry in record["tuned"]] == [0.6, 0.5]
    best = min(record["tuned"], key=lambda entry: entry["heldout_ppl"])
    assert record["attn_ratio"] == pytest.approx(1 - best["attention_density"])
    said = [message for message in caplog.messages if message.startswith("held-out perplexity")]
    assert len(said) == 2 and "attention_density 0.5" in said[1]
    given = PIFA.run(arguments("m", save_path=tmp_path, density=0.6, attn_ratio=record["attn_ratio"]))
    assert given["ranks"] == record["ranks"] and "tuned" not in given


def test_an_attention_density_that_no_mlp_balances_is_not_tried(arguments, tmp_path):
    """At 0.95 an attention density of 0.85 would need more than all of the MLP, which here is little larger."""
    record = PIFA.run(arguments("m", save_path=tmp_path, density=0.95, allocation="type"))
    assert "tuned" not in record and record["attn_ratio"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": 2, "heldout_nsamples": 0}, "choose on held-out windows, and there are none"),
        ({"allocation": "type", "heldout_nsamples": 0}, "choose on held-out windows, and there are none"),
        ({"tune": 2, "reconstruct_step": 0, "allocation": "uniform"}, "--tune has nothing to choose"),
        ({"tune": -1}, "--tune -1 is below 0"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(arguments, tmp_path, capsys, changes, message):
    assert PIFA.main(arguments("m", save_path=tmp_path / "new", **changes)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_the_choice_is_kept_in_the_manifest(tuned_run):
    manifest = json.loads((Path(tuned_run["path"]) / "manifest.json").read_text())
    assert manifest["settled"]["tuned"] == tuned_run["tuned"]
