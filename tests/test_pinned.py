"""What must stay while the code moves: options, identities of runs, tensors, records, exit codes and error lines.

The expected values lie in tests/pinned/. They were read off the code as it was before its rooms; a run that such code
began has to resume, and a script that calls it has to get the same answers.
"""

import hashlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import PIFA
from tests import tiny

PINNED = Path(__file__).parent / "pinned"
# the same for every command below; paths are relative, as they are part of what a run is known by
CALIBRATION = shlex.split("--pruning_nsamples 4 --reconstruct_nsamples 4 --heldout_nsamples 2 --model_seq_len 32")
ON = ["--DEV", "cpu"]
M = ["--mode", "m", "--model", "tiny", "--dataset", "words.txt", "--density", "0.6", *CALIBRATION, *ON]
# kind of run -> the flags of `--mode m` that make it
RUNS: dict[str, list[str]] = {
    "default": [],
    "paper": ["--reconstruct_step", "2", "--owl", "--attn_ratio", "0.3"],
    "svd": ["--prune", "svd", "--no-use_pifa", "--reconstruct_step", "1", "--allocation", "uniform"],
    "type": ["--allocation", "type", "--rank_multiple", "4"],
    "refined": ["--refine_steps", "2", "--passes", "2", "--tune", "1"],
    "flatllm": ["--prune", "flatllm"],
    "auto": ["--prune", "auto"],
}
BENCH = shlex.split(
    "--mode bench --bench_what layer --bench_dims 64 --bench_tokens 1 --bench_seconds 0.01 --dtype float32 "
    "--save_path out"
)
TRAINING = shlex.split("--order full --max_steps 2 --batch_size 2 --cutoff_len 16 --data_path words.txt")


def pinned(name: str) -> Any:
    return json.loads((PINNED / f"{name}.json").read_text())


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


def hash_of(value: Any) -> str:
    """sha256 of canonical JSON: what names a run."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a tiny model, a text, and whatever else the pinned command lines name."""
    folder = tmp_path_factory.mktemp("workplace")
    tiny.save_model(folder / "tiny", tiny.build())
    for name in ("words.txt", "text.txt", "tasks.json", "file.json"):
        (folder / name).write_text(tiny.text())
    for name in ("folder", "tasks", "profile"):
        (folder / name).mkdir()
    return folder


@pytest.fixture
def there(workplace, monkeypatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


@pytest.fixture(scope="module")
def made(workplace) -> dict[str, dict[str, Any]]:
    """Records of one run of every mode, by its name; folders are named by `path`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        m = PIFA.run([*M, "--save_path", "out"])
        given = ["--model_path", m["path"], "--save_path", "out", *ON]
        pifa = PIFA.run(["--mode", "pifa", *given])
        given[1] = pifa["path"]
        judged = [*given, "--model_seq_len", "32"]
        few = ["--dataset", "words.txt", *CALIBRATION]
        commands = {
            "quantize": ["--mode", "quantize", *given, *few, "--group_size", "16"],
            "finetune": ["--mode", "finetune", *given, *TRAINING],
            "bi": ["--mode", "bi", "--model", "tiny", "--save_path", "out", "--density", "0.6", *few, *ON],
            "ppl": ["--mode", "ppl", *judged, "--dataset", "words.txt", "--eval_nsamples", "2"],
            "generate": ["--mode", "generate", *judged, "--prompt", "abc", "--max_new_tokens", "3"],
            "info": ["--mode", "info", *given],
            "export": ["--mode", "export", *given],
            "bench": [*BENCH, *ON],
        }
        return {"m": m, "pifa": pifa, **{mode: PIFA.run(argv) for mode, argv in commands.items()}}


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("number", range(len(pinned("command_lines"))))
def test_flags_mean_what_they_meant(number, there):
    case = pinned("command_lines")[number]
    found = vars(PIFA.parse(case["argv"]))
    assert {name: found[name] for name in case["options"]} == case["options"]


def errors_of(there: Path, capsys) -> Callable[[str], list[Any]]:
    def run(line: str) -> list[Any]:
        code = PIFA.main(line.split())
        out, err = capsys.readouterr()
        assert out == ""
        return [code, err.splitlines()[-1]]

    return run


@pytest.mark.parametrize("line", pinned("errors"))
def test_mistakes_get_the_line_they_got(line, there, capsys):
    assert errors_of(there, capsys)(line) == pinned("errors")[line]
    assert not (there / "new").exists()


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("kind", RUNS)
def test_runs_of_m_are_known_by_the_same_hash(kind, there):
    """The folder's name has its first digits, so that --resume finds what older code began."""
    record = PIFA.run([*M, *RUNS[kind], "--save_path", f"runs/{kind}"])
    found = {
        "folder": Path(record["path"]).name,
        "flags": json_of(Path(record["path"]) / "manifest.json")["flags"],
        "profiles": sorted(path.name for path in Path(f"runs/{kind}").glob("profile_*")),
    }
    assert found == pinned("identities")[kind]


def test_a_pivoting_run_is_known_by_its_source_and_dtype(there, made):
    manifest, source = (json_of(Path(made[mode]["path"]) / "manifest.json") for mode in ("pifa", "m"))
    assert manifest["flags"] == hash_of({"source": source, "dtype": "float32"})
    folded = PIFA.run(["--mode", "pifa", "--model_path", made["m"]["path"], "--save_path", "fold", "--fold", *ON])
    manifest = json_of(Path(folded["path"]) / "manifest.json")
    assert manifest["flags"] == hash_of({"source": source, "dtype": "float32", "fold": True})
    assert Path(folded["path"]).name == f"{Path(made['m']['path']).name}-pifa-fold"


def test_a_quantizing_run_is_known_by_all_that_decides_its_integers(there, made):
    manifest, source = (json_of(Path(made[mode]["path"]) / "manifest.json") for mode in ("quantize", "pifa"))
    decisive = {
        "method": "gptq",
        "bits": 4,
        "group_size": 16,
        "act_order": True,
        "old_output_factor": 0.25,
        "drift_factor": 0.5,
        "integer_share": 0.32,
        "dataset": "words.txt",
        "windows": 4,
        "model_seq_len": 32,
        "windows_sha256": pinned("identities")["windows"],
    }
    assert manifest["flags"] == hash_of({"source": source, "dtype": "float32", **decisive})
    assert Path(made["quantize"]["path"]).name == f"{Path(made['pifa']['path']).name}-gptq4"


def test_a_training_run_is_known_by_all_that_decides_its_factors(there, made):
    manifest, source = (json_of(Path(made[mode]["path"]) / "manifest.json") for mode in ("finetune", "pifa"))
    decisive = {
        "order": "full",
        "data_path": ["words.txt"],
        "num_epochs": None,
        "max_steps": 2,
        "learning_rate": 3e-6,
        "warmup_ratio": 0.05,
        "batch_size": 2,
        "micro_batch_size": 1,
        "cutoff_len": 16,
        "compute_dtype": "float32",
        "seed": 3,
        "data": pinned("identities")["rows"],
    }
    assert manifest["flags"] == hash_of({"source": source, "dtype": "float32", **decisive})
    name = f"{Path(made['pifa']['path']).name}-ft-{manifest['flags'][:8]}"
    assert Path(made["finetune"]["path"]).name == name


def test_self_written_text_is_known_by_its_writer(there, made):
    argv = shlex.split(
        "--mode finetune --order full --teacher original --data_path self:0.5 words.txt:0.5 --max_steps 2"
    )
    more = shlex.split("--batch_size 2 --cutoff_len 16 --save_path written")
    PIFA.run([*argv, *more, "--model_path", made["pifa"]["path"], *ON])
    assert sorted(path.name for path in Path("written").glob("*.safetensors")) == pinned("identities")["self"]


# ---------------------------------------------------------------- folders and records


def described(folder: Path) -> dict[str, dict[str, Any]]:
    """Every tensor of a folder: where it is, what it is, and enough of its numbers to notice others."""
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            wide = tensor.double()
            found[f"{shard.name} {name}"] = {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype),
                "norm": wide.norm().item(),
                "first": wide.flatten()[:2].tolist(),
                "bytes": hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16],
            }
    return found


def processor() -> str:
    """What decides the last bit of a float product: the library, and what it can do here."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {_model_of_cpu()}"


def _model_of_cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


@pytest.mark.parametrize("mode", ["m", "pifa", "quantize"])
def test_folders_hold_the_tensors_that_they_held(mode, there, made):
    """To the bit on the processor that the bits were noted on; elsewhere as near as rounding lets them be."""
    expected, found = pinned("tensors")[mode], described(Path(made[mode]["path"]))
    assert found.keys() == expected.keys()
    for name, before in expected.items():
        now = found[name]
        assert (now["shape"], now["dtype"]) == (before["shape"], before["dtype"]), name
        if processor() == pinned("tensors")["processor"]:
            assert now["bytes"] == before["bytes"], name
        elif mode != "quantize":  # there one rounding more decides an integer
            assert now["norm"] == pytest.approx(before["norm"], rel=1e-4), name


@pytest.mark.parametrize("mode", ["m", "pifa", "quantize", "finetune"])
def test_folders_hold_the_files_that_they_held(mode, there, made):
    names = {path.name for path in Path(made[mode]["path"]).iterdir()} - {"finetune.png"}  # drawn where matplotlib is
    assert sorted(names) == pinned("folders")[mode]


@pytest.mark.parametrize("mode", ["m", "pifa", "quantize"])
def test_configs_say_what_they_said(mode, there, made):
    config = json_of(Path(made[mode]["path"]) / "config.json")
    del config["transformers_version"]
    assert config == pinned("configs")[mode]


def test_records_have_the_keys_that_they_had(there, made):
    assert {mode: sorted(record) for mode, record in made.items()} == pinned("records")
