"""PIFA.py: every flag means what it says; a wrong one ends before the work, with exit code 2 and one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import PIFA
from component.modes import MODES
from tests import tiny
from utils import data

REPOSITORY = Path(PIFA.__file__).parent

# flags that are wrong whatever the model -> a word of the line
BAD_FLAGS = {
    "mode": ({"mode": "compress"}, "unknown --mode compress: use one of m, bi, pifa, ppl"),
    "dataset": ({"dataset": "wikitext3"}, "unknown dataset wikitext3: use one of wikitext2"),
    "pruner": ({"prune": "magnitude"}, "unknown --prune magnitude: use one of svd-llm, svd, asvd"),
    "allocation": ({"allocation": "equal"}, "unknown --allocation equal: use one of uniform, type"),
    "dtype": ({"dtype": "int8"}, "unknown --dtype int8: use one of float32"),
    "reconstruct_step": ({"reconstruct_step": 3}, "unknown --reconstruct_step 3: use one of 0, 1, 2, -1"),
    "no whitening samples": ({"pruning_nsamples": 0}, "--pruning_nsamples 0 is below 1"),
    "no reconstruction samples": ({"reconstruct_nsamples": 0}, "--reconstruct_nsamples 0 is below 1"),
    "less than none": ({"reconstruct_nsamples": -5}, "--reconstruct_nsamples -5 is below 1"),
    "no window": ({"model_seq_len": 0}, "--model_seq_len 0 is below"),
    "no evaluation windows": ({"eval_nsamples": 0}, "--eval_nsamples 0 is below 1"),
    "no batch": ({"eval_batch_size": 0}, "--eval_batch_size 0 is below 1"),
    "not a number": ({"pruning_nsamples": "many"}, "argument --pruning_nsamples"),
    "a ratio of one": ({"overall_ratio": 1.0}, "--overall_ratio 1 is outside [0,1)"),
    "a ratio below zero": ({"overall_ratio": -0.1}, "--overall_ratio -0.1 is outside [0,1)"),
    "a ratio that is no number": ({"overall_ratio": "nan"}, "--overall_ratio nan is outside [0,1)"),
    "an attention ratio of one": ({"attn_ratio": 1.0}, "--attn_ratio 1 is outside [0,1)"),
    "no density": ({"density": 0.0}, "--density 0 is outside (0,1]"),
    "a density above one": ({"density": 1.1}, "--density 1.1 is outside (0,1]"),
    "both": ({"density": 0.5, "overall_ratio": 0.5}, "--density and --overall_ratio"),
    "a mix ratio above one": ({"old_output_factor": 1.5}, "--old_output_factor 1.5 is outside [0,1]"),
    "type without its ratio": ({"allocation": "type", "heldout_nsamples": 0}, "--allocation type without --attn_ratio"),
    "two allocations": ({"allocation": "uniform", "attn_ratio": 0.2}, "can't go with uniform"),
    "several texts": ({"dataset": ["pydoc", "pydoc"]}, "several --dataset are for --mode ppl"),
    "another machine": ({"DEV": "tpu"}, "unknown --DEV tpu: use cpu, cuda or cuda:N"),
    "a card that is no number": ({"DEV": "cuda:first"}, "unknown --DEV cuda:first"),
    "a card that is absent": ({"DEV": "cuda:99"}, "--DEV cpu works everywhere"),
    "a fold of nothing": ({"fold": True}, "--fold is for --mode pifa"),
    "a bench in no time": ({"mode": "bench", "bench_seconds": 0}, "--bench_seconds takes a time above 0"),
    "an abbreviation": ({"overall": 0.2}, "unrecognized arguments: --overall"),
    "an unknown flag": ({"sparsity": 0.2}, "unrecognized arguments: --sparsity"),
}


@pytest.mark.parametrize("mistake", BAD_FLAGS)
def test_bad_flags(mistake, arguments, tmp_path, bad):
    changes, word = BAD_FLAGS[mistake]
    mode = changes.get("mode", "m")
    flags = {name: value for name, value in changes.items() if name != "mode"}
    bad(arguments(mode, save_path=tmp_path / "new", **flags), word)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mode", ["m", "pifa", "ppl", "generate", "eval", "info", "export"])
def test_flags_are_checked_in_every_mode(mode, arguments, bad):
    bad(arguments(mode, eval_batch_size=0), "--eval_batch_size 0 is below 1")


def test_a_mode_is_needed(bad):
    bad([], "--mode")


@pytest.mark.parametrize("mode", ["m", "pifa", "ppl"])
def test_cuda_asked_for_but_absent(mode, arguments, bad, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bad(arguments(mode, DEV="cuda"), "--DEV cuda: this machine has 0 CUDA devices")


BAD_SIZES = {
    "attention ratio": ({"overall_ratio": 0.1, "attn_ratio": 0.9}, "an attention ratio between"),
    "no rank": ({"density": 0.01}, "it needs at least"),
}


@pytest.mark.parametrize("mistake", BAD_SIZES)
def test_sizes_that_the_models_shapes_do_not_allow(mistake, arguments, tmp_path, bad):
    changes, word = BAD_SIZES[mistake]
    bad(arguments("m", save_path=tmp_path / "new", **changes), word)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mode", ["m", "ppl"])
def test_a_text_shorter_than_one_window(mode, arguments, tmp_path, bad):
    (tmp_path / "short.txt").write_text("too short")
    path = "original" if mode == "ppl" else None
    bad(arguments(mode, dataset=tmp_path / "short.txt", model_path=path), "too few for a window of 32")


def help_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        PIFA.main([*argv, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_tells_every_mode_and_what_most_of_them_read(capsys):
    text = help_of(capsys)
    for name, mode in PIFA.modes().items():
        assert re.search(rf"^  {name} +{re.escape(mode.SUMMARY)}$", text, flags=re.MULTILINE)
    assert "--save_path FOLDER" in text and "--seed N" in text and "--fold" not in text


@pytest.mark.parametrize("mode", MODES)
def test_help_of_a_mode_tells_its_flags_and_no_others(mode, capsys):
    text = help_of(capsys, "--mode", mode)
    told = set(re.findall(r"^  --(\w+)", text, flags=re.MULTILINE))
    assert told == {"mode", *(flag.name for flag in PIFA.modes()[mode].FLAGS)}


@pytest.mark.parametrize("line", ["--mode=pifa --help", "--mode m --mode pifa -h", "--help --mode pifa"])
def test_help_of_a_mode_that_is_named_in_any_way(line, capsys):
    assert help_of(capsys, *line.split()) == help_of(capsys, "--mode", "pifa")
    with pytest.raises(SystemExit):
        PIFA.run(line.split())


@pytest.mark.parametrize("mode", MODES)
def test_help_texts_are_whole_phrases(mode):
    for flag in PIFA.modes()[mode].FLAGS:
        assert re.fullmatch(r"[A-Z].*\.", flag.help), flag.name


def test_help_tells_every_flag(capsys):
    text = "".join(help_of(capsys, *(["--mode", mode] if mode else [])) for mode in (None, *MODES))
    flags = """mode model model_path save_path prefix resume overall_ratio density attn_ratio allocation use_pifa prune
        reconstruct_step old_output_factor pruning_nsamples reconstruct_nsamples seed dataset model_seq_len
        eval_batch_size eval_nsamples DEV dtype rank_multiple heldout_nsamples tune drift_factor output_shrinkage
        profile_nsamples profiling_mat_path owl prompt max_new_tokens token_power ridge passes refine_steps fold
        bench_what bench_dims bench_tokens bench_seconds prompt_file temperature chat tasks task_path num_fewshot
        task_limit format step ratio whitening_nsamples updating_nsamples lora bits
        group_size quantize_method act_order bi_score prune_method sparsity_ratio nsamples save_model tol
        cache_dir teacher"""
    assert [flag for flag in flags.split() if not re.search(rf"--{flag}\b", text)] == []


def test_a_flag_that_the_mode_does_not_read_is_named_and_changes_nothing(arguments, caplog):
    plain = vars(PIFA.parse(arguments("quantize", prune=None)))
    caplog.clear()
    options = vars(PIFA.parse(arguments("quantize", prune="svd", tune=3, use_pifa=True)))
    assert [m for m in caplog.messages if "does not read" in m] == [
        "--mode quantize does not read --model, --pruning_nsamples, --prune, --tune, --use_pifa"
    ]
    for name in (flag.name for flag in PIFA.modes()["quantize"].FLAGS):
        assert options[name] == plain[name]
    assert options["drift_factor"] == 0.5


def test_a_wrong_combination_of_flags_of_another_mode_is_no_mistake(arguments, pivoted, tmp_path, good):
    argv = arguments(
        "info", model_path=pivoted, save_path=tmp_path, allocation="nope.json", density=0.5, overall_ratio=0.5
    )
    assert good(argv)["path"] == str(pivoted)


LIGHT = """
import sys
import PIFA
try:
    code = PIFA.main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
heavy = [name for name in ("torch", "transformers", "datasets", "safetensors") if name in sys.modules]
sys.exit(f"{heavy} imported") if heavy else sys.exit(code)
"""


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("--mode m --help", 0),
        ("--mode compress", 2),
        ("--mode m --densty 0.5", 2),
        ("--mode m --model absent.gguf", 2),
        ("--mode m --model ./absent", 2),
        ("--mode m --allocation absent.json", 2),
        ("--mode pifa --model_path absent", 2),
        ("--mode ppl --model_path absent", 2),
        ("--mode quantize --bits 5", 2),
    ],
)
def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported(line, code):
    command = [sys.executable, "-c", LIGHT, *line.split()]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stderr


def test_it_runs_as_a_script_from_anywhere(tmp_path):
    command = [sys.executable, REPOSITORY / "PIFA.py", "--mode", "compress"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (2, "")
    modes = "m, bi, pifa, ppl, eval, generate, finetune, quantize, info, export, bench"
    assert result.stderr.splitlines() == [f"PIFA.py: unknown --mode compress: use one of {modes}"]


def test_the_default_density_is_that_of_a_ratio_of_a_fifth(arguments, tmp_path, good):
    record = good(arguments("m", save_path=tmp_path))
    assert (record["density_asked"], record["overall_ratio"]) == (0.8, 0.2)
    assert record["density_pivoted"] <= 0.8


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_density_is_the_ratio_the_other_way_round(ratio, arguments, tmp_path, good):
    removed = good(arguments("m", save_path=tmp_path / "a", overall_ratio=ratio))
    kept = good(arguments("m", save_path=tmp_path / "b", density=1 - ratio))
    assert tiny.contents(Path(removed["path"]), ("pifa.json",)) == tiny.contents(Path(kept["path"]), ("pifa.json",))


def test_attn_ratio_selects_type(arguments, tmp_path, good):
    record = good(arguments("m", save_path=tmp_path, overall_ratio=0.4, attn_ratio=0.6))
    assert record["allocation"] == "type" and "_type_" in Path(record["path"]).name
    uniform = good(arguments("m", save_path=tmp_path, overall_ratio=0.4, allocation="uniform"))["ranks"]
    smaller = [name for name, rank in record["ranks"].items() if rank < uniform[name]]
    assert sorted(smaller) == sorted(name for name in uniform if "self_attn" in name)
    assert 0.55 < record["density_pivoted"] <= 0.6


def test_density_one_changes_nothing(arguments, model_folder, tmp_path, good):
    record = good(arguments("m", save_path=tmp_path, density=1.0))
    assert record["density"] == record["density_model"] == 1.0 and set(record["ranks"].values()) == {None}
    compressed = good(arguments("ppl", save_path=tmp_path))["ppl"]
    assert compressed == good(arguments("ppl", model_path="original"))["ppl"]


def test_several_texts_are_evaluated_in_one_go(arguments, text_file, tmp_path, good):
    other = tmp_path / "other.txt"
    other.write_text(tiny.text(1200)[4000:])
    record = good(arguments("ppl", model_path="original", dataset=[text_file, other], eval_nsamples=5))
    alone = [good(arguments("ppl", model_path="original", dataset=d, eval_nsamples=5)) for d in (text_file, other)]
    assert record["ppls"] == {str(text_file): alone[0]["ppl"], str(other): alone[1]["ppl"]}
    assert record["ppl"] == alone[0]["ppl"] != alone[1]["ppl"]
    assert (record["windows"], record["density"], record["path"]) == (5, 1.0, "original")


@pytest.mark.parametrize("mode", ["m", "ppl"])
def test_the_offline_default_is_said_and_recorded(mode, arguments, tmp_path, good, monkeypatch, caplog):
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr(data, "_cached", lambda name: False)
    path = "original" if mode == "ppl" else None
    record = good(arguments(mode, dataset=None, model_path=path, save_path=tmp_path, eval_nsamples=2))
    assert record["dataset"] == "pydoc"
    assert any("using pydoc instead" in message for message in caplog.messages)


def test_defaults_on_a_cpu_are_said(arguments, caplog):
    flags = dict.fromkeys(["pruning_nsamples", "reconstruct_nsamples", "model_seq_len"])
    options = PIFA.parse(arguments("m", **flags))
    assert (options.pruning_nsamples, options.reconstruct_nsamples, options.model_seq_len) == (16, 16, 512)
    caplog.set_level("INFO", logger="pifa")
    PIFA.parse(arguments("m", **flags))
    assert sum("on CPU --" in message for message in caplog.messages) == 3
