"""component/modes/aliases.py: SVD-LLM's flags mean what they mean there, and contradictions are refused."""

import pytest

import PIFA
from component.modes.aliases import expand

METHODS = {  # --step -> prune, reconstruct_step; both, and the mix ratio, are those of the paper's rows
    1: ("svd-llm", 0),
    2: ("svd-llm", 1),
    3: ("svd", 1),
}


def parsed(*argv: str):
    return PIFA.parse([*argv, "--DEV", "cpu"])


@pytest.mark.parametrize("step", METHODS)
def test_the_compressing_steps(step):
    options = parsed("--step", str(step), "--ratio", "0.4", "--whitening_nsamples", "7")
    assert (options.mode, options.prune, options.reconstruct_step) == ("m", *METHODS[step])
    assert (options.density, options.pruning_nsamples) == (0.6, 7)  # the ratio is the fraction removed
    assert (options.use_pifa, options.allocation, options.heldout_nsamples) == (False, "uniform", 0)
    assert (options.drift_factor, options.output_shrinkage, options.token_power) == (0, None, 0)
    if step > 1:
        assert (options.old_output_factor, options.reconstruct_nsamples) == (0, 16)


@pytest.mark.parametrize(("step", "mode"), [(4, "ppl"), (5, "bench"), (6, "info"), (7, "generate")])
def test_the_other_steps_are_modes(step, mode):
    assert parsed(f"--step={step}").mode == mode
    assert parsed("--step", str(step), "--mode", mode).mode == mode


def test_the_command_is_recorded_as_it_was_typed():
    assert parsed("--step", "1", "--ratio", "0.3").command.startswith("python PIFA.py --step 1 --ratio 0.3")


def test_what_the_user_says_goes_before_what_a_step_implies():
    options = parsed(
        "--step", "2", "--updating_nsamples", "5", "--use_pifa", "--allocation", "kl", "--heldout_nsamples", "3"
    )
    assert (options.reconstruct_nsamples, options.use_pifa) == (5, True)
    assert (options.allocation, options.heldout_nsamples) == ("kl", 3)
    assert parsed("--step", "1", "--attn_ratio", "0.1").allocation == "type"
    assert parsed("--step", "2", "--reconstruct_nsamples", "9").reconstruct_nsamples == 9


def test_a_command_line_without_aliases_stays_as_it_is():
    argv = ["--mode", "m", "--reconstruct_step", "-1", "--chat", "--prompt=--step 3"]
    assert expand(argv) == argv


CONTRADICTIONS = {
    "two modes": (["--step", "1", "--mode", "ppl"], "--step 1 means --mode m"),
    "two pruners": (["--step", "3", "--prune", "svd-llm"], "--step 3 means --prune svd"),
    "two reconstructions": (["--step", "1", "--reconstruct_step", "2"], "--step 1 means --reconstruct_step 0"),
    "two mix ratios": (["--step", "2", "--old_output_factor", "0.25"], "--step 2 means --old_output_factor 0"),
    "two ratios": (["--step", "1", "--ratio", "0.2", "--overall_ratio", "0.2"], "--ratio and --overall_ratio"),
    "ratio and density": (["--step", "1", "--ratio", "0.2", "--density", "0.8"], "--ratio and --density"),
    "two whitenings": (["--step", "1", "--whitening_nsamples", "4", "--pruning_nsamples", "4"], "give one"),
    "two updates": (["--step", "2", "--updating_nsamples", "4", "--reconstruct_nsamples", "4"], "give one"),
    "an unknown step": (["--step", "8"], "unknown --step 8: use one of 1, 2, 3"),
    "no number": (["--step", "two"], "argument --step"),
    "lora": (["--step", "4", "--lora", "adapter"], "--mode finetune"),
    "a ratio in percent": (["--step", "1", "--ratio", "20"], "outside [0,1): it is the fraction removed"),
    "neither step nor mode": (["--ratio", "0.2"], "--mode"),
}


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_contradictions_are_refused(contradiction, bad):
    bad(*CONTRADICTIONS[contradiction])


def test_equal_numbers_are_no_contradiction():
    assert parsed("--step", "2", "--old_output_factor", "0.0", "--reconstruct_step", "1").old_output_factor == 0


def test_step_1_is_whitening_by_the_other_names(arguments, tmp_path, good):
    common = {"save_path": tmp_path, "density": None}
    step = arguments("m", **common)[2:]  # without --mode m
    by_step = good(["--step", "1", "--ratio", "0.4", *step])
    same = {"no-use_pifa": True, "allocation": "uniform", "heldout_nsamples": 0, "reconstruct_step": 0}
    by_name = good(arguments("m", **{**common, **same}, overall_ratio=0.4, resume=True))
    assert by_name["path"] == by_step["path"] and by_name == by_step
    assert by_step["density"] <= 0.6


@pytest.mark.parametrize(
    "changes", [{"prune": "svd"}, {"prune": "asvd"}, {"reconstruct_step": 0}, {"reconstruct_step": 2}]
)
def test_published_methods_keep_to_one_density(changes):
    flags = [str(part) for name, value in changes.items() for part in (f"--{name}", value)]
    options = parsed("--mode", "m", *flags)
    assert (options.allocation, options.drift_factor, options.token_power) == ("uniform", 0, 0)
    assert parsed("--mode", "m", *flags, "--allocation", "kl").allocation == "kl"
    assert parsed("--mode", "m").allocation == "kl"
