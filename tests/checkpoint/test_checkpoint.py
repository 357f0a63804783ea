"""checkpoint/reading.py and format/integration.py: what was computed is what is stored, and what any loader gets."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import PIFA
from component import LowRankLinear, PIFAConfig, PIFALinear
from component.checkpoint import reading as files
from component.checkpoint.counting import count_numbers
from component.checkpoint.writer import CheckpointWriter
from component.pivot.pivoting import pivot
from tests import tiny
from utils.errors import UsageError
from utils.whole_files import PARTIAL

PROMPT = tiny.token_windows(2, 24)
TIMES = (files.RECORD,)  # holds seconds, memory, paths


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(PROMPT, use_cache=False).logits


def loaded(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def pivoted_in_memory(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankLinear):
            pivots = pivot(module.u.weight, module.v.weight)
            model.set_submodule(name, PIFALinear.from_pivots(*pivots, module.bias, torch.float32))
    return model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_are_bit_equal_to_the_model_in_memory(family, arguments, tmp_path, computed):
    """Through both modes: the model with the driver's own layers put in, against the one that from_pretrained makes."""
    model = tiny.build(family)
    original = tiny.save_model(tmp_path / "original", model)
    low_rank = PIFA.run(arguments("m", model=original, density=0.6, save_path=tmp_path))
    pivots = PIFA.run(arguments("pifa", model_path=low_rank["path"], save_path=tmp_path))

    layers = "model.decoder.layers" if family == "opt" else "model.layers"
    dense = logits(model)
    for index, layer in computed.items():
        model.set_submodule(f"{layers}.{index}", layer)
    expected = logits(model)
    assert not torch.allclose(expected, dense, rtol=0.01, atol=0.01)  # something was compressed
    assert torch.equal(logits(loaded(low_rank["path"])), expected)
    from_pivots = logits(loaded(pivots["path"]))
    assert torch.equal(from_pivots, logits(pivoted_in_memory(model)))
    assert tiny.relative(from_pivots, expected) < 1e-4


def test_the_folder_holds_the_files_of_the_format(compressed, pivoted):
    shards = {"layer-00000.safetensors", "layer-00001.safetensors", "rest.safetensors"}
    for folder in (compressed, pivoted):
        names = {path.name for path in folder.iterdir()}
        expected = {"config.json", "manifest.json", "pifa.json", "model.safetensors.index.json"}
        expected |= {"integration.py", "linear.py", "packed.py"}
        expected |= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
        assert names >= shards | expected
        assert not any(name.startswith(".") or name.endswith((".bin", ".pt", ".pkl")) for name in names)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["shards"] == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in shards}
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        held = {name: shard for shard in shards for name in load_file(folder / shard)}
        assert index["weight_map"] == held
        tensors = tiny.stored_tensors(folder).values()
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors)


def test_config_says_what_each_linear_is_stored_as(compressed, pivoted):
    for folder, kind, tensors in [
        (compressed, "lowrank", {"u.weight", "v.weight", "weight"}),
        (pivoted, "pifa", {"pivot.weight", "coeff.weight", "perm", "weight"}),
    ]:
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
        quantization = config["quantization_config"]
        assert (quantization["quant_method"], quantization["format_version"]) == ("pifa", 1)
        assert len(quantization["layers"]) == 14
        stored = tiny.stored_tensors(folder)
        for name, entry in quantization["layers"].items():
            assert entry["kind"] == kind
            assert {key.removeprefix(f"{name}.") for key in stored if key.startswith(f"{name}.")} == tensors
            assert stored[f"{name}.weight"].shape == (0,)
            first = stored[f"{name}.{'v' if kind == 'lowrank' else 'pivot'}.weight"]
            assert first.shape == (entry["rank"], entry["in_features"])


def test_tied_embeddings_are_stored_once(compressed):
    assert "lm_head.weight" not in tiny.stored_tensors(compressed)
    assert "model.embed_tokens.weight" in tiny.stored_tensors(compressed)


@pytest.mark.parametrize("kind", ["compressed", "pivoted"])
def test_dequantize_gives_back_linears(kind, request):
    model = loaded(request.getfixturevalue(kind))
    expected = logits(model)
    weights = {n: m.dense_weight() for n, m in model.named_modules() if isinstance(m, (LowRankLinear, PIFALinear))}
    dense = model.dequantize()
    assert len(weights) == 14
    for name, weight in weights.items():
        linear = dense.get_submodule(name)
        assert type(linear) is nn.Linear and torch.equal(linear.weight, weight)
    assert tiny.relative(logits(dense), expected) < 1e-5


def test_dequantize_keeps_biases(arguments, tmp_path):
    original = tiny.save_model(tmp_path / "original", tiny.build("qwen2"))
    model = loaded(PIFA.run(arguments("m", model=original, save_path=tmp_path))["path"])
    expected = logits(model)
    assert tiny.relative(logits(model.dequantize()), expected) < 1e-5


def test_a_loaded_model_saves_itself(pivoted, tmp_path):
    """save_pretrained of a loaded model writes a folder that loads again."""
    model = loaded(pivoted)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(model))


def test_a_loaded_model_has_gradients(pivoted):
    model = loaded(pivoted)
    model(PROMPT, labels=PROMPT).loss.backward()
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in layer.parameters())


# ---------------------------------------------------------------- loaders that do not have this repository

LOAD = """
import hashlib, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
trust, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust == "trust").eval()
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)("two words")["input_ids"]])
    with torch.no_grad():
        print(hashlib.sha256(model(tokens).logits.numpy().tobytes()).hexdigest())
assert "component" not in sys.modules
"""


def elsewhere(tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Run LOAD in a process whose sys.path does not have the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, *map(str, arguments)]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)


def test_loads_where_the_repository_is_absent(compressed, pivoted, tmp_path):
    result = elsewhere(tmp_path, "trust", compressed, pivoted)
    assert result.returncode == 0, result.stderr
    tokens = torch.tensor([tiny.tokenizer()("two words")["input_ids"]])
    with torch.no_grad():
        here = [loaded(folder)(tokens).logits for folder in (compressed, pivoted)]
    assert result.stdout.split() == [hashlib.sha256(scores.numpy().tobytes()).hexdigest() for scores in here]


@pytest.mark.parametrize("kind", ["compressed", "pivoted"])
def test_an_unaware_loader_fails(kind, request, tmp_path):
    result = elsewhere(tmp_path, "distrust", request.getfixturevalue(kind))
    assert result.returncode != 0 and result.stdout == ""
    assert "mismatch" in result.stderr.lower()  # of the sentinel, and not for want of a file


@pytest.mark.parametrize("kind", ["compressed", "pivoted"])
def test_a_loader_that_ignores_the_config_fails_on_the_sentinel(kind, request, tmp_path):
    """Without quantization_config the family's nn.Linear meets a weight of shape (0,)."""
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy")
    tiny.edit_json(folder / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(RuntimeError):
        loaded(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"format_version": 2}, "PIFA format 2"), ({"layers": {"a": {"kind": "butterfly"}}}, "butterfly")],
)
def test_an_unknown_format_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PIFAConfig(**changes)


# ---------------------------------------------------------------- same bytes, interrupted or not

RUNS = {"m": "compressed", "pifa": "pivoted"}


def again(mode: str, arguments, compressed: Path, parent: Path, **changes) -> list[str]:
    """The command that made the fixture of `mode`, into another parent."""
    given = {"density": 0.6} if mode == "m" else {"model_path": compressed}
    return arguments(mode, save_path=parent, **given, **changes)


@pytest.mark.parametrize("mode", RUNS)
def test_two_runs_give_the_same_bytes(mode, arguments, compressed, request, tmp_path):
    first = request.getfixturevalue(RUNS[mode])
    second = Path(PIFA.run(again(mode, arguments, compressed, tmp_path))["path"])
    assert second.name == first.name
    assert tiny.contents(second, TIMES) == tiny.contents(first, TIMES)
    differ = {
        "seconds",
        "profile_seconds",
        "layer_seconds",
        "peak_memory_gib",
        "peak_host_memory_gib",
        "path",
        "command",
        "finished_at",
    }
    old, new = (json.loads((folder / files.RECORD).read_text()) for folder in (first, second))
    assert {key: value for key, value in old.items() if key not in differ} == {
        key: value for key, value in new.items() if key not in differ
    }


class PowerCut(Exception):
    pass


@pytest.fixture
def cut_after_one_shard(monkeypatch):
    """The second shard of a run is never written. Returns how to have power again."""
    write, written = CheckpointWriter.write, []

    def failing(self, shard, tensors):
        if self.folder.name.startswith("profile_"):
            return write(self, shard, tensors)
        if written:
            raise PowerCut
        written.append(shard)
        return write(self, shard, tensors)

    monkeypatch.setattr(CheckpointWriter, "write", failing)
    return monkeypatch.undo


@pytest.mark.parametrize("mode", RUNS)
@pytest.mark.parametrize("left", ["whole", "damaged", "missing"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    left, mode, arguments, compressed, request, tmp_path, cut_after_one_shard
):
    """The shard that the interrupted run finished is used only if it is still what was written."""
    whole = tiny.contents(request.getfixturevalue(RUNS[mode]), TIMES)
    command = again(mode, arguments, compressed, tmp_path)
    with pytest.raises(PowerCut):
        PIFA.run(command)
    cut_after_one_shard()
    (folder,) = tmp_path.glob("tiny*")
    shard, *copied = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in copied] == ([files.REST] if mode == "pifa" else [])  # is copied beside the work
    assert {path.name for path in folder.iterdir()} == {path.name for path in (shard, *copied)} | {"manifest.json"}
    with pytest.raises(UsageError, match="--resume"):
        PIFA.run(command)
    with pytest.raises(UsageError, match="unfinished"):
        files.read_checkpoint(folder)
    with pytest.raises(UsageError, match="no finished"):
        files.newest_checkpoint(tmp_path, None)

    if left == "damaged":
        shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    elif left == "missing":
        shard.unlink()
    before = shard.stat().st_mtime_ns if left == "whole" else None
    record = PIFA.run([*command, "--resume"])
    assert Path(record["path"]) == folder
    assert before is None or shard.stat().st_mtime_ns == before
    assert tiny.contents(folder, TIMES) == whole


@pytest.mark.parametrize("mode", RUNS)
def test_resume_where_nothing_is_starts(mode, arguments, compressed, request, tmp_path):
    record = PIFA.run(again(mode, arguments, compressed, tmp_path, resume=True))
    assert tiny.contents(Path(record["path"]), TIMES) == tiny.contents(request.getfixturevalue(RUNS[mode]), TIMES)


@pytest.mark.parametrize("mode", RUNS)
def test_a_finished_run_is_never_overwritten_and_resumed_gives_its_record(mode, arguments, compressed, tmp_path):
    command = again(mode, arguments, compressed, tmp_path)
    record = PIFA.run(command)
    before = tiny.contents(Path(record["path"]))
    with pytest.raises(UsageError, match="nothing is ever overwritten"):
        PIFA.run(command)
    assert PIFA.run([*command, "--resume"]) == record
    assert tiny.contents(Path(record["path"])) == before


def test_other_flags_are_another_folder(arguments, compressed, tmp_path):
    for number, changes in enumerate([{"seed": 4}, {"no-use_pifa": True}, {"old_output_factor": 0.5}]):
        record = PIFA.run(again("m", arguments, compressed, tmp_path, **changes))
        assert Path(record["path"]).name != compressed.name
        assert len(list(tmp_path.glob("tiny*"))) == number + 1


def test_other_flags_cannot_resume_a_folder(arguments, compressed, tmp_path):
    PIFA.run(again("pifa", arguments, compressed, tmp_path))
    with pytest.raises(UsageError, match="other flags"):
        PIFA.run(again("pifa", arguments, compressed, tmp_path, resume=True, dtype="float16"))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "taken").mkdir()
    mine = tmp_path / "taken" / "thesis.txt"
    mine.write_text("mine")
    for resume, message in [(False, "nothing is ever overwritten"), (True, "holds no run of this tool")]:
        with pytest.raises(UsageError, match=message), CheckpointWriter(tmp_path / "taken", "hash", resume):
            pass
    assert list((tmp_path / "taken").iterdir()) == [mine]


@pytest.mark.parametrize("behind", [False, True])
def test_a_file_that_fails_to_be_written_leaves_nothing(behind, tmp_path):
    with CheckpointWriter(tmp_path / "new", "hash", False) as writer:
        shared = torch.zeros(4)
        write = writer.write_behind if behind else writer.write
        with pytest.raises(RuntimeError):
            write("a.safetensors", {"one": shared, "two": shared})  # safetensors refuses shared memory
            writer.flush()
        assert {path.name for path in (tmp_path / "new").iterdir()} == {"manifest.json", ".lock"}
        assert not writer.finished("a.safetensors")
    assert not (tmp_path / "new").exists()


KILLED_WHILE_A_SHARD_IS_WRITTEN = """
import os, signal, sys, threading, torch
from pathlib import Path
from component.checkpoint.writer import CheckpointWriter

folder = Path(sys.argv[1])

def kill():
    while not any(path.suffix != ".json" and path.stat().st_size for path in folder.rglob("*/*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

with CheckpointWriter(folder, "hash", False) as writer:
    threading.Thread(target=kill, daemon=True).start()
    writer.write("a.safetensors", {"a": torch.ones(2**26)})
"""


def test_nothing_of_a_shard_that_was_half_written_stays(tmp_path):
    """Whatever name safetensors gives to what it has not finished."""
    folder = tmp_path / "new"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_A_SHARD_IS_WRITTEN, folder], cwd=Path(PIFA.__file__).parent
    )
    assert killed.returncode == -signal.SIGKILL
    left = {path.name for path in folder.iterdir()}
    assert left == {"manifest.json", ".lock", f".a.safetensors{PARTIAL}"}
    with CheckpointWriter(folder, "hash", True) as writer:
        assert {path.name for path in folder.iterdir()} == {"manifest.json", ".lock"}
        writer.write("a.safetensors", {"a": torch.ones(2)})
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "a.safetensors"}


# ---------------------------------------------------------------- reading


def test_the_newest_checkpoint_of_a_kind_is_found(compressed, pivoted, tmp_path):
    for number, (folder, name) in enumerate([(compressed, "b"), (pivoted, "a"), (compressed, "c")]):
        copy = shutil.copytree(folder, tmp_path / name)
        tiny.edit_json(copy / files.RECORD, lambda record, n=number: record.update(finished_at=f"2024-01-0{n + 1}"))
    (tmp_path / "stray file").write_text("")
    assert files.newest_checkpoint(tmp_path, None).folder.name == "c"
    assert files.newest_checkpoint(tmp_path, "lowrank").folder.name == "c"
    assert files.newest_checkpoint(tmp_path, "pifa").folder.name == "a"


@pytest.mark.parametrize("harm", ["flipped bit", "cut short", "missing"])
@pytest.mark.parametrize("shard", ["layer-00001.safetensors", "rest.safetensors"])
def test_a_damaged_shard_is_named(shard, harm, compressed, tmp_path):
    path = shutil.copytree(compressed, tmp_path / "copy") / shard
    content = path.read_bytes()
    path.unlink()
    if harm == "flipped bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "cut short":
        path.write_bytes(content[:-4])
    files.read_checkpoint(compressed).verify()
    with pytest.raises(UsageError, match=f"{shard} is {'missing' if harm == 'missing' else 'damaged'}"):
        files.read_checkpoint(path.parent).verify()


def test_a_shard_that_is_no_safetensors_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="is damaged"):
        files.open_shard(path)


@pytest.mark.parametrize("kind", ["compressed", "pivoted"])
def test_counts_are_those_of_the_stored_tensors(kind, request):
    folder = request.getfixturevalue(kind)
    checkpoint = files.read_checkpoint(folder)
    counts = count_numbers(folder, checkpoint.layers)
    owned = {
        name: tensor
        for name, tensor in tiny.stored_tensors(folder).items()
        if any(name.startswith(f"{layer}.") for layer in checkpoint.layers) and not name.endswith(".bias")
    }
    assert counts.linears == sum(tensor.numel() for tensor in owned.values())
    assert counts.linear_bytes == sum(tensor.numel() * tensor.element_size() for tensor in owned.values())
    dense = sum(parameter.numel() for n, parameter in tiny.build().named_parameters() if "layers" in n and "proj" in n)
    assert counts.dense_linears == dense
    assert checkpoint.record["density"] == counts.density == counts.linears / dense
    whole = sum(parameter.numel() for parameter in tiny.build().parameters())
    assert counts.density_model == pytest.approx((whole - dense + counts.linears) / whole, rel=1e-3)


def test_biases_are_no_part_of_the_density(tmp_path):
    tensors = {"a.v.weight": torch.ones(2, 6), "a.u.weight": torch.ones(4, 2), "a.weight": torch.ones(0)}
    save_file({**tensors, "a.bias": torch.ones(4), "norm": torch.ones(6)}, tmp_path / "one.safetensors")
    weight_map = dict.fromkeys([*tensors, "a.bias", "norm"], "one.safetensors")
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    counts = count_numbers(tmp_path, {"a": {"in_features": 6, "out_features": 4}})
    assert (counts.linears, counts.dense_linears, counts.model, counts.linear_bytes) == (20, 24, 30, 80)
