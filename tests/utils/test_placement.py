"""utils/placement.py: past the limit hidden states are in files, which leave no name behind and change no number."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import PIFA
from component.checkpoint import reading as files
from tests import tiny
from utils.placement import Shelf, free_bytes, home, stays_on_card, wake

CPU = torch.device("cpu")


def mapped_bytes(folder: Path) -> int:
    """Of this process, from files in the folder that have no name any more."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"{folder}/.hidden-states-" in line:
            assert line.endswith("(deleted)")
            begin, end = (int(word, 16) for word in line.split()[0].split("-"))
            total += end - begin
    return total


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at the mappings of this process")
@pytest.mark.parametrize(
    ("limit", "size", "is_mapped"), [(None, 2**20, False), (2**20, 2**20, False), (1, 2**20, True)]
)
def test_only_what_is_above_the_limit_is_mapped(limit, size, is_mapped, tmp_path):
    tensor = Shelf(limit, tmp_path).room(size, CPU)((2**17,), torch.float64)
    assert tensor.shape == (2**17,) and tensor.dtype == torch.float64
    assert mapped_bytes(tmp_path) == (2**20 if is_mapped else 0)
    assert list(tmp_path.iterdir()) == []
    tensor.copy_(torch.arange(2**17))
    assert tensor[-1] == 2**17 - 1
    del tensor
    assert mapped_bytes(tmp_path) == 0


@pytest.mark.parametrize("shape", [(3, 5, 7), (1,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mapped_tensors_are_tensors(shape, dtype, tmp_path):
    tensor = Shelf(0, tmp_path).room(1, CPU)(shape, dtype)
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert tensor.shape == shape and torch.equal(tensor.copy_(expected), expected)
    for part, other in zip(tensor.split(2), expected.split(2), strict=True):
        part.copy_(other * 2)  # views write through
    assert torch.equal(tensor, expected * 2)


def test_a_disk_without_room_is_an_error_and_no_hole(tmp_path):
    """A mapped hole would end the process with SIGBUS when it is written to."""
    program = (
        "import resource, sys, torch; from pathlib import Path; from utils.placement import Shelf\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try:\n    Shelf(0, Path(sys.argv[1])).room(1, torch.device('cpu'))((1000,), torch.float64)\n"
        "except OSError as error:\n    print(error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert int(done.stdout) in (errno.EFBIG, errno.ENOSPC), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes", [{"allocation": "uniform", "output_shrinkage": 1, "token_power": 0, "refine_steps": 2}, {}]
)
def test_mapped_hidden_states_change_no_byte(changes, arguments, tmp_path, monkeypatch):
    """In compression with refinement, and in the profile."""
    made: list[int] = []
    mapped = Shelf._mapped

    def counting(shelf, shape, dtype):
        made.append(torch.Size(shape).numel())
        return mapped(shelf, shape, dtype)

    monkeypatch.setattr(Shelf, "_mapped", counting)
    room = Shelf.room
    folders = []
    for name, limit in (("memory", None), ("files", 1000)):
        # whatever the flags say
        monkeypatch.setattr(Shelf, "room", lambda self, *given, n=limit: room(Shelf(n, self.folder), *given))
        command = arguments("m", save_path=tmp_path / name, density=0.6, **changes)
        folders.append(Path(PIFA.run(command)["path"]))
        assert bool(made) == (limit is not None)
        assert not [name for name in os.listdir(tmp_path / name) if name.startswith(".")]
    # two flows, and what refinement starts from; or the profile's states around two layers, and gradients
    assert len(made) == 2 + (1 if changes else 4)
    memory, spilled = (tiny.contents(folder, (files.RECORD,)) for folder in folders)
    assert memory == spilled


def test_the_host_is_home_without_a_card():
    wake(CPU)
    assert free_bytes(CPU) is None
    assert home(1, CPU) == CPU


def test_hidden_states_take_no_more_than_a_quarter_of_a_card():
    assert stays_on_card(24, 100) and not stays_on_card(25, 100)
