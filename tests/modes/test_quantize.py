"""--mode quantize: what is in the folder is what was in memory, and what can't be quantized is refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import component.format.integration  # noqa: F401
import PIFA
from component.checkpoint import reading as files
from component.checkpoint.counting import count_numbers
from component.checkpoint.writer import CheckpointWriter
from component.format.packed import PackedLinear
from component.quantize import folder as quantize
from tests import tiny
from utils import models

pytest.importorskip("compressed_tensors")


def logits(model):
    with torch.no_grad():
        return model(tiny.token_windows(2, 16), use_cache=False).logits


@pytest.mark.parametrize("source", ["compressed", "pivoted"])
@pytest.mark.parametrize(("method", "dtype"), [("gptq", "float32"), ("gptq", "bfloat16"), ("rtn", "float32")])
def test_the_folder_is_the_model_in_memory(source, method, dtype, arguments, request, tmp_path, monkeypatch):
    kept, inner = [], quantize.quantize_model

    def keep(walk, *rest, **more):
        kept.append(walk.model)
        inner(walk, *rest, **more)

    monkeypatch.setattr(quantize, "quantize_model", keep)
    folder = request.getfixturevalue(source)
    given = {"quantize_method": method, "bits": 8, "dtype": dtype}
    record = PIFA.run(arguments("quantize", model_path=folder, save_path=tmp_path, **given))
    loaded = AutoModelForCausalLM.from_pretrained(record["path"])
    assert any(isinstance(module, PackedLinear) for module in loaded.modules())
    assert torch.equal(logits(loaded), logits(kept[0]))
    assert loaded.dtype == models.DTYPES[dtype]
    before = AutoModelForCausalLM.from_pretrained(folder)
    assert 0 < tiny.relative(logits(loaded), logits(before)) < 0.05
    rounding = 1e-4 if dtype == "float32" else 0.03
    assert tiny.relative(logits(loaded.dequantize()), logits(kept[0])) < rounding


def test_four_bits_are_a_quarter_of_the_bytes(arguments, pivoted, tmp_path):
    record = PIFA.run(arguments("quantize", model_path=pivoted, save_path=tmp_path, quantize_method="rtn"))
    before = files.read_checkpoint(pivoted)
    size = count_numbers(pivoted, before.layers).linear_bytes
    assert record["linear_bytes"] < 0.35 * size  # of float32: an eighth, scales, zeros, and the index as it was


def test_the_share_has_room_for_other_forms(arguments, pivoted, tmp_path):
    """Of the linears' bytes in float16. Each folder loads, and counts, as what it says it stores."""
    names = files.read_checkpoint(pivoted).layers
    before, seen, sizes = AutoModelForCausalLM.from_pretrained(pivoted), [], []
    for share in (0, 0.5, 10):
        given = {"group_size": 16, "integer_share": share, "reconstruct_nsamples": 32}
        record = PIFA.run(arguments("quantize", model_path=pivoted, save_path=tmp_path, prefix=share, **given))
        checkpoint = files.read_checkpoint(record["path"])
        kinds = {name: (entry["kind"], entry.get("outer_bits", 4)) for name, entry in checkpoint.layers.items()}
        seen.append({kind for name, kind in kinds.items() if names[name]["kind"] == "pifa"})
        sizes.append(record["linear_bytes"])
        loaded = AutoModelForCausalLM.from_pretrained(record["path"])
        assert tiny.relative(logits(loaded), logits(before)) < 0.5
        # packed numbers fill whole words
        packed = [m for m in loaded.modules() if isinstance(m, PackedLinear)]
        least = sum(m.in_features * m.out_features for m in packed)
        dense = sum(entry["in_features"] * entry["out_features"] for entry in names.values())
        assert least < record["density"] * dense < 1.3 * least
    assert seen[0] == {("pifa", 4)} and ("pifa", 8) in seen[1] and ("dense", 4) in seen[2]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3


def test_what_layers_before_lost_is_made_up_for(arguments, pivoted, tmp_path):
    """On the text that calibrates: the target of both flows against that of the integers' flow alone."""
    original = AutoModelForCausalLM.from_pretrained(pivoted)
    errors = []
    for ratio in (0, 0.5):
        given = {"old_output_factor": ratio, "drift_factor": ratio, "reconstruct_nsamples": 32, "integer_share": 0}
        command = arguments("quantize", model_path=pivoted, save_path=tmp_path, prefix=ratio, **given)
        loaded = AutoModelForCausalLM.from_pretrained(PIFA.run(command)["path"])
        windows = tiny.token_windows(8, 16)
        with torch.no_grad():
            both = [model.model(windows, use_cache=False).last_hidden_state for model in (loaded, original)]
        errors.append(tiny.relative(*both))
    assert errors[1] < errors[0]


def test_an_interrupted_run_goes_on(arguments, pivoted, tmp_path, monkeypatch):
    whole = PIFA.run(arguments("quantize", model_path=pivoted, save_path=tmp_path / "a"))
    write, written = CheckpointWriter.write, []

    def fail(self, shard, tensors):
        if written:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, tensors)

    command = arguments("quantize", model_path=pivoted, save_path=tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", fail)
        with pytest.raises(BaseException):  # noqa: B017
            PIFA.run(command)
    resumed = PIFA.run([*command, "--resume"])
    shards = [json.loads((Path(r["path"]) / "manifest.json").read_text())["shards"] for r in (whole, resumed)]
    assert shards[0] == shards[1]


def test_what_cannot_be_quantized_is_refused(arguments, pivoted, model_folder, tmp_path, bad):
    bad(arguments("quantize", model_path="original", save_path=tmp_path), "--mode m")
    bad(arguments("quantize", model_path=model_folder, save_path=tmp_path), "not a checkpoint")
    done = PIFA.run(arguments("quantize", model_path=pivoted, save_path=tmp_path, quantize_method="rtn"))["path"]
    bad(arguments("quantize", model_path=done, save_path=tmp_path), "quantized already")
    bad(arguments("pifa", model_path=done, save_path=tmp_path), "quantized already")
    bad(arguments("quantize", bits=3), "--bits")
    bad(arguments("quantize", integer_share=-1), "--integer_share")
    bad(arguments("quantize", group_size=12), "--group_size")
