"""component/checkpoint/info.py: what it counts is what the folder holds, and a picture is an extra."""

from pathlib import Path

import pytest

import PIFA
from component.checkpoint import reading as files
from component.checkpoint.info import StoredLinear, by_place
from tests import tiny
from utils import plots


@pytest.mark.parametrize("kind", ["compressed", "pivoted"])
def test_the_record_counts_what_is_stored(kind, request, arguments, tmp_path, good):
    folder = request.getfixturevalue(kind)
    tensors, stored = tiny.stored_tensors(folder), files.read_checkpoint(folder)
    record = good(arguments("info", model_path=folder, save_path=tmp_path))
    assert record["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert record["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert record["density"] == stored.record["density"] and record["density_model"] == stored.record["density_model"]
    assert record["ranks"] == stored.record["ranks"]
    for name, entry in stored.layers.items():
        own = [tensor for key, tensor in tensors.items() if key.startswith(f"{name}.") and not key.endswith("bias")]
        numbers = sum(tensor.numel() for tensor in own)
        assert record["densities"][name] == numbers / (entry["in_features"] * entry["out_features"])
    assert record["seed"] == 3
    assert record["made_by"]["command"] == stored.record["command"]
    assert record["made_by"]["windows_sha256"] == stored.record["windows_sha256"]


def test_the_tables_are_printed_before_the_record(compressed, arguments, tmp_path, capsys, good):
    record = good(arguments("info", model_path=compressed, save_path=tmp_path))
    assert PIFA.main(arguments("info", model_path=compressed, save_path=tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    columns = (
        "mlp.down_proj mlp.gate_proj mlp.up_proj self_attn.k_proj self_attn.o_proj self_attn.q_proj self_attn.v_proj"
    )
    header = f"| layer | {' | '.join(columns.split())} |"
    places = [number for number, line in enumerate(lines) if line == header]
    assert len(places) == 2  # densities, ranks
    names = [f"model.layers.0.{column}" for column in columns.split()]
    densities = [f"{record['densities'][name]:.3f}" for name in names]
    assert lines[places[0] + 2] == f"| 0 | {' | '.join(densities)} |"
    assert lines[places[1] + 2] == f"| 0 | {' | '.join(str(record['ranks'][name]) for name in names)} |"


def test_the_original_is_dense(arguments, model_folder, tmp_path, good):
    record = good(arguments("info", model_path="original", save_path=tmp_path))
    model = tiny.build()
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert record["density"] == 1 and set(record["densities"].values()) == {1.0} and record["kinds"] == {"dense": 14}


def test_without_matplotlib_it_says_what_installs_it(compressed, arguments, tmp_path, good, monkeypatch, caplog):
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    record = good(arguments("info", model_path=compressed, save_path=tmp_path))
    assert record["picture"] is None and not list(tmp_path.iterdir())
    assert any("pip install -r requirements-plots.txt" in message for message in caplog.messages)


def test_the_picture_is_drawn_once_and_never_overwritten(compressed, arguments, tmp_path, good):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: requirements-plots.txt")
    command = arguments("info", model_path=compressed, save_path=tmp_path)
    picture = Path(good(command)["picture"])
    assert picture.parent == tmp_path and picture.read_bytes().startswith(b"\x89PNG")
    picture.write_bytes(b"mine")
    assert good(command)["picture"] == str(picture) and picture.read_bytes() == b"mine"


def test_a_layer_that_lacks_a_type_leaves_its_cell_empty():
    linears = [
        StoredLinear(name="m.layers.0.a", kind="lowrank", rank=2, dense_numbers=10, numbers=5, size=20),
        StoredLinear(name="m.layers.1.a", kind="dense", rank=None, dense_numbers=10, numbers=10, size=40),
        StoredLinear(name="m.layers.1.mlp.b", kind="pifa", rank=3, dense_numbers=10, numbers=1, size=4),
    ]
    assert by_place(linears, lambda one: one.rank).splitlines()[2:] == ["| 0 | 2 |  |", "| 1 | None | 3 |"]
