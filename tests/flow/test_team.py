"""component/flow/team.py: two gloo processes on the CPU see, solve and write what one process does."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import PIFA
from component.checkpoint import reading as files
from component.flow.team import Team
from tests import tiny
from tests.flow import team_moments
from utils.errors import UsageError

HERE = Path(__file__).parents[2]
UNIFORM = {"density": 0.6, "allocation": "uniform", "output_shrinkage": 1, "token_power": 0}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def torchrun(*words: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    argv = [*TORCHRUN, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(argv, cwd=HERE, env=environment, text=True, start_new_session=True, **pipes)


@pytest.mark.parametrize(("count", "size"), [(7, 2), (8, 3), (4, 4), (128, 8)])
def test_windows_are_shared_out_in_order(count, size):
    shares = [Team(rank, size).share(count) for rank in range(size)]
    assert shares[0][0] == 0 and shares[-1][1] == count
    assert all(one[1] == other[0] for one, other in itertools.pairwise(shares))
    lengths = [end - begin for begin, end in shares]
    assert max(lengths) - min(lengths) <= 1 and min(lengths) >= 1


def test_more_processes_than_windows_are_refused():
    with pytest.raises(UsageError, match="4 processes for 3 windows"):
        Team(0, 4).share(3)


def test_alone_nothing_is_exchanged():
    team, factors = Team(), (tiny.rand(4, 2), tiny.rand(2, 3))
    assert team.agreed("value") == "value"
    assert all(a is b for a, b in zip(team.factors(factors, 0, torch.device("cpu")), factors, strict=True))


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("team")
    done = torchrun("-m", "tests.flow.team_moments", folder)
    _, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", team_moments.SOLVERS)
def test_moments_and_factors_are_those_of_one_process(kind, both):
    """Whitening looks at fewer windows than the second process begins with: its sums are then the first one's."""
    alone, tensors = team_moments.compress(Team(), kind)
    seen = [found[kind][0] for found in both]
    assert not seen[0].keys() & seen[1].keys()  # each module is solved once
    together = seen[0] | seen[1]
    assert together.keys() == alone.keys() and all(seen)
    for name, moments in alone.items():
        for field, expected in vars(moments).items():
            found = together[name][field]
            assert (found is None) == (expected is None)
            if expected is not None:
                # in the first layer there is no drift yet
                assert (found - expected).norm() <= 1e-5 * expected.norm()
    first, second = (found[kind][1] for found in both)
    assert first.keys() == second.keys() == tensors.keys()
    assert all(torch.equal(t, second[key]) for key, t in first.items())
    for key, t in tensors.items():
        if t.numel() and not key.endswith((".u.weight", ".v.weight")):
            assert torch.equal(t, first[key])
    for key in (key.removesuffix("u.weight") for key in tensors if key.endswith(".u.weight")):
        products = [t[f"{key}u.weight"].double() @ t[f"{key}v.weight"].double() for t in (first, tensors)]
        assert tiny.relative(*products) < 1e-3  # truncation and damping make more of a moment's rounding


@pytest.mark.parametrize("changes", [UNIFORM, {"density": 0.6, "passes": 2}])
def test_a_run_of_two_has_the_ranks_of_one_and_can_be_read(changes, arguments, tmp_path):
    """With a profile, a draft and a second profile; and resumed by one process where it was damaged."""
    alone = PIFA.run(arguments("m", save_path=tmp_path / "one", **changes))
    done = torchrun("PIFA.py", *arguments("m", save_path=tmp_path / "two", **changes))
    out, errors = done.communicate(timeout=180)
    assert done.returncode == 0, errors
    record, _ = json.JSONDecoder().raw_decode(out)
    assert record["processes"] == 2
    if changes is UNIFORM:
        assert record["ranks"] == alone["ranks"]
    folder = Path(record["path"])
    assert folder.name == Path(alone["path"]).name and not list(folder.glob(".*"))
    files.read_checkpoint(folder).verify()
    one, two = (tiny.stored_tensors(Path(r["path"])) for r in (alone, record))
    assert one.keys() == two.keys()
    (folder / files.RECORD).unlink()
    (folder / files.layer_shard(1)).unlink()
    again = PIFA.run(arguments("m", save_path=tmp_path / "two", resume=True, **changes))
    assert again["ranks"] == record["ranks"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_all_within_a_minute(victim, arguments, tmp_path):
    argv = arguments("m", save_path=tmp_path / "out", **{**UNIFORM, "reconstruct_nsamples": 256, "pruning_nsamples": 8})
    done = torchrun("PIFA.py", *argv)
    try:
        until = time.monotonic() + 60
        while not list((tmp_path / "out").glob(f"*/{files.MANIFEST}")):
            assert done.poll() is None and time.monotonic() < until
            time.sleep(0.005)
        os.kill(workers(done.pid)[victim], signal.SIGKILL)
        killed = time.monotonic()
        _, errors = done.communicate(timeout=60)
    finally:
        if done.poll() is None:
            os.killpg(done.pid, signal.SIGKILL)
    assert time.monotonic() - killed < 60
    assert done.returncode == 1
    said = [line for line in errors.splitlines() if "PIFA.py: " in line]
    assert any("another process is gone" in line or "ended by SIGTERM" in line for line in said), errors
    assert all("--resume goes on" in line for line in said)
    record = PIFA.run([*argv, "--resume"])
    files.read_checkpoint(record["path"]).verify()


def workers(parent: int) -> list[int]:
    """torchrun's children by their rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            above = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words = (process / "environ").read_text().split("\0") if above == parent else []
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        for word in words:
            if word.startswith("RANK="):
                found[int(word.removeprefix("RANK="))] = int(process.name)
    return [found[rank] for rank in sorted(found)]


def test_refinement_is_refused():
    from component.compress.pipeline import check_method

    settings = tiny.settings(refine_steps=2, **UNIFORM)
    check_method(settings, 1)
    with pytest.raises(UsageError, match="without torchrun"):
        check_method(settings, 2)
