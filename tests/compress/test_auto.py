"""--prune auto: narrower blocks beside factors, what they are predicted to lose, and that the best on held-out wins."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import component.compress.pipeline
import PIFA
from component.checkpoint.counting import stored_as
from component.checkpoint.entries import kind_of
from component.compress.auto_planner import FORMS, MIXED, AutoPlanner
from component.format.linear import PIFALinear
from component.ranks.cost import PIVOTED
from tests import tiny
from tests.tiny import relative

WINDOWS = tiny.token_windows(6, 24)
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
    monkeypatch.setattr(component.compress.pipeline, "choose_recipe", pytest.fail)
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
