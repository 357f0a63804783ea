"""component/compress.py: allocations and targets that go beyond the paper's, through the front door."""

import json
from pathlib import Path

import pytest

import PIFA
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
