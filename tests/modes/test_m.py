"""--mode m: allocations and targets that go beyond the paper's, through the front door."""

import json
from pathlib import Path

import pytest
import torch

import PIFA
from component.checkpoint import reading as files
from tests import tiny

BEYOND = {"allocation": "kl", "drift_factor": 0.5, "output_shrinkage": 0.3, "profile_nsamples": 2, "density": 0.6}


@pytest.fixture(scope="module")
def run_beyond(arguments, tmp_path_factory):
    parent = tmp_path_factory.mktemp("beyond")
    return PIFA.run(arguments("m", save_path=parent, **BEYOND))


def test_kl_with_drift_and_weighting_keeps_the_density_and_pivots(run_beyond, arguments, tmp_path):
    assert run_beyond["density_pivoted"] <= 0.6
    assert len(set(run_beyond["ranks"].values())) > 4  # it is not uniform
    pivoted = PIFA.run(arguments("pifa", model_path=run_beyond["path"], save_path=tmp_path))
    assert pivoted["density"] == pytest.approx(run_beyond["density_pivoted"])


@pytest.mark.parametrize(
    "changes", [{"owl": True}, {"owl": True, "attn_ratio": 0.5}, {"allocation": "iprs"}], ids=["owl", "ns", "iprs"]
)
def test_layer_wise_allocations_run_and_hold_the_density(arguments, tmp_path, changes):
    record = PIFA.run(arguments("m", save_path=tmp_path, density=0.6, profile_nsamples=2, **changes))
    assert 0.55 < record["density_pivoted"] <= 0.6
    assert record["allocation"] == changes.get("allocation", "owl")


@pytest.mark.parametrize("allocation", ["uniform", "atp", "asvd"])
def test_ranks_are_multiples_where_asked(arguments, tmp_path, allocation):
    flags = {"density": 0.6, "profile_nsamples": 2, "rank_multiple": 8, "allocation": allocation}
    record = PIFA.run(arguments("m", save_path=tmp_path, **flags))
    assert all(rank is None or rank % 8 == 0 for rank in record["ranks"].values())
    assert 0.55 < record["density_pivoted"] <= 0.6
    assert record["rank_multiple"] == 8


def test_calibration_does_not_see_the_held_out_windows(arguments, tmp_path, text_file):
    """Another text from there on gives the same factors; with nothing held out it does not."""
    text = text_file.read_text()
    other = tmp_path / "other.txt"
    other.write_text(text[: -16 * 32] + "z" * (16 * 32))  # a token per letter
    shas, factors = {}, {}
    for count in (16, 0):
        flags = {"density": 0.6, "heldout_nsamples": count, "reconstruct_nsamples": 99}
        records = [
            PIFA.run(arguments("m", save_path=tmp_path / path.stem, dataset=path, **flags))
            for path in (text_file, other)
        ]
        assert all(record["heldout_nsamples"] == count for record in records)
        shas[count] = {record["windows_sha256"] for record in records}
        factors[count] = [tiny.contents(Path(record["path"]))["layer-00001.safetensors"] for record in records]
    assert len(shas[16]) == 1 and factors[16][0] == factors[16][1]
    assert len(shas[0]) == 2 and factors[0][0] != factors[0][1]


def test_its_plan_file_gives_the_same_ranks(run_beyond, arguments, tmp_path):
    plan = Path(run_beyond["path"]) / "plan.json"
    again = PIFA.run(arguments("m", save_path=tmp_path, allocation=plan))
    assert again["ranks"] == run_beyond["ranks"]


def test_a_second_density_reuses_the_profile(run_beyond, arguments):
    parent = Path(run_beyond["path"]).parent
    (profile,) = parent.glob("profile_*")
    before = tiny.contents(profile)
    PIFA.run(arguments("m", save_path=parent, **{**BEYOND, "density": 0.7}))
    assert list(parent.glob("profile_*")) == [profile]
    assert tiny.contents(profile) == before


def test_the_profile_of_another_seed_is_refused(run_beyond, arguments, capsys):
    parent = Path(run_beyond["path"]).parent
    (profile,) = parent.glob("profile_*")
    code = PIFA.main(arguments("m", save_path=parent, profiling_mat_path=profile, seed=9, **BEYOND))
    assert code == 2
    assert "other flags, another model or other data" in capsys.readouterr().err.splitlines()[-1]


def test_a_profile_is_no_checkpoint(run_beyond, arguments):
    """--mode ppl takes the newest checkpoint, and the profile beside it is not one."""
    record = PIFA.run(arguments("ppl", save_path=Path(run_beyond["path"]).parent))
    assert json.loads((Path(record["path"]) / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drift_factor": 2}, "outside [0,1]"),
        ({"drift_factor": 0.5, "reconstruct_step": 0}, "needs a reconstruction"),
        ({"output_shrinkage": 0}, "outside (0,1]"),
        ({"output_shrinkage": 0.3, "reconstruct_step": 2}, "exact solver"),
        ({"allocation": "nowhere.json"}, "no such plan"),
        ({"token_power": -1}, "no number from 0 on"),
        ({"ridge": float("inf")}, "no number from 0 on"),
        ({"token_power": 0.5, "reconstruct_step": 0}, "needs a reconstruction"),
        ({"refine_steps": 3, "reconstruct_step": 0}, "needs a reconstruction"),
        ({"passes": 0}, "below 1"),
        ({"passes": 2, "allocation": "uniform", "reconstruct_step": 2}, "for what reads a profile"),
        ({"profile_nsamples": 0}, "below 1"),
        ({"rank_multiple": 0}, "below 1"),
        ({"heldout_nsamples": -1}, "below 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(arguments, capsys, changes, message):
    assert PIFA.main(arguments("m", **changes)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_record_says_how_long_the_profile_took(run_beyond):
    assert 0 < run_beyond["profile_seconds"] < run_beyond["seconds"]


def test_the_papers_method_needs_no_profile(arguments, tmp_path):
    off = {"token_power": 0, "output_shrinkage": 1, "drift_factor": 0, "allocation": "uniform", "density": 0.6}
    for number, changes in enumerate([off, {"reconstruct_step": 2, "allocation": "uniform", "density": 0.6}]):
        record = PIFA.run(arguments("m", save_path=tmp_path / str(number), **changes))
        assert list((tmp_path / str(number)).iterdir()) == [Path(record["path"])]
        constants = [record[name] for name in ("token_power", "output_shrinkage", "drift_factor")]
        assert constants == [0, None, 0]


@pytest.mark.parametrize(
    "changes",
    [{"allocation": "kl"}, {"token_power": 0.5}, {"output_shrinkage": 0.3}],
    ids=lambda changes: next(iter(changes)),
)
def test_each_of_three_things_asks_for_a_profile(changes, arguments, tmp_path):
    off = {"token_power": 0, "output_shrinkage": 1, "allocation": "uniform", "density": 0.6, "profile_nsamples": 2}
    PIFA.run(arguments("m", save_path=tmp_path, **{**off, **changes}))
    assert len(list(tmp_path.glob("profile_*"))) == 1


def test_the_ridge_is_in_the_record_and_in_the_factors(run_beyond, arguments):
    parent = Path(run_beyond["path"]).parent
    record = PIFA.run(arguments("m", save_path=parent, ridge=0.1, **BEYOND))
    assert (record["ridge"], run_beyond["ridge"]) == (0.1, 1e-3)
    assert record["ranks"] == run_beyond["ranks"]
    shards = [(Path(run["path"]) / files.layer_shard(0)).read_bytes() for run in (record, run_beyond)]
    assert shards[0] != shards[1]


# ---------------------------------------------------------------- a second pass


@pytest.fixture(scope="module")
def second_pass(arguments, tmp_path_factory):
    return PIFA.run(arguments("m", save_path=tmp_path_factory.mktemp("passes"), passes=2, **BEYOND))


def test_a_second_pass_makes_a_second_profile_and_another_plan_of_the_same_density(second_pass, run_beyond):
    parent = Path(second_pass["path"]).parent
    profiles = list(parent.glob("profile_*"))
    assert len(profiles) == 2 and len(list(parent.iterdir())) == 3
    (first,) = Path(run_beyond["path"]).parent.glob("profile_*")
    assert first.name in {profile.name for profile in profiles}
    assert (second_pass["passes"], run_beyond["passes"]) == (2, 1)
    assert second_pass["ranks"] != run_beyond["ranks"]
    for record in (second_pass, run_beyond):
        assert 0.59 < record["density_pivoted"] <= 0.6


def test_a_second_pass_goes_on_to_the_same_bytes(second_pass, arguments):
    folder = Path(second_pass["path"])
    profiles = {path: tiny.contents(path) for path in folder.parent.glob("profile_*")}
    before = tiny.contents(folder, (files.RECORD,))
    (folder / files.layer_shard(1)).unlink()
    (folder / files.RECORD).unlink()
    record = PIFA.run(arguments("m", save_path=folder.parent, passes=2, resume=True, **BEYOND))
    assert record["ranks"] == second_pass["ranks"]
    assert tiny.contents(folder, (files.RECORD,)) == before
    assert {path: tiny.contents(path) for path in folder.parent.glob("profile_*")} == profiles


def test_the_profile_of_the_second_pass_stands_beside_the_named_one(second_pass, arguments, tmp_path):
    named = tmp_path / "mine"
    record = PIFA.run(arguments("m", save_path=tmp_path / "out", passes=2, profiling_mat_path=named, **BEYOND))
    assert record["ranks"] == second_pass["ranks"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine-pass2", "out"]
    assert list((tmp_path / "out").iterdir()) == [Path(record["path"])]


# ---------------------------------------------------------------- refinement


def test_refinement_lowers_or_keeps_every_layers_error_and_the_record_says_so(arguments, tmp_path, caplog):
    caplog.set_level("INFO", logger="pifa")
    # a V step from plain SVD leaves something to do, the exact solver little
    flags = {
        "density": 0.6,
        "reconstruct_nsamples": 64,
        "allocation": "uniform",
        "prune": "svd",
        "reconstruct_step": -1,
    }
    plain, refined = (PIFA.run(arguments("m", save_path=tmp_path, refine_steps=steps, **flags)) for steps in (0, 3))
    assert (plain["refine_steps"], refined["refine_steps"]) == (0, 3)
    said = [message for message in caplog.messages if " refined: relative error " in message]
    errors = [[float(number) for number in message.split("error ")[1].split(" -> ")] for message in said]
    assert len(errors) == 2 and all(after <= before for before, after in errors)
    assert any(after < before for before, after in errors)
    factors = [tiny.stored_tensors(Path(record["path"])) for record in (plain, refined)]
    assert factors[0].keys() == factors[1].keys() and plain["ranks"] == refined["ranks"]
    changed = {name for name, tensor in factors[0].items() if not torch.equal(tensor, factors[1][name])}
    assert changed and all(name.endswith(("u.weight", "v.weight")) for name in changed)


def test_a_plan_that_cannot_be_leaves_no_folder(arguments, compressed, tmp_path, bad):
    plan = json.loads((compressed / "plan.json").read_text())
    del plan["layers"]["model.layers.0.mlp.up_proj"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    for _ in range(2):
        argv = arguments("m", allocation=tmp_path / "plan.json", save_path=tmp_path / "out")
        bad(argv, "model.layers.0.mlp.up_proj")
        assert not list((tmp_path / "out").glob("tiny_*"))
