"""Runs that are killed, told to end, met by a full disk or by another run: the same bytes in the end, or one line."""

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

import PIFA
from component.checkpoint import reading as files
from tests import children, tiny
from utils.endings import one_line_endings
from utils.errors import RunError, UsageError
from utils.lock import LOCK, locked
from utils.whole_files import PARTIAL

TIMES = (files.RECORD,)  # holds seconds, memory, paths
MODES = {"m": "compressed", "pifa": "pivoted"}
SMALLER = {"density": 0.6, "allocation": "uniform", "output_shrinkage": 1, "token_power": 0}  # no profile: fewer steps


@pytest.fixture(scope="module")
def uniform(arguments, tmp_path_factory) -> Path:
    return Path(PIFA.run(arguments("m", save_path=tmp_path_factory.mktemp("uniform"), **SMALLER))["path"])


@pytest.fixture
def command(arguments, uniform, tmp_path):
    """command(mode, ...): a command line that makes a folder under tmp_path / "out"."""

    def make(mode: str, **changes) -> list[str]:
        given = SMALLER if mode == "m" else {"model_path": uniform}
        return [str(word) for word in arguments(mode, save_path=tmp_path / "out", **given, **changes)]

    return make


def one_line(errors: Path, word: str) -> None:
    """The process said what happened in its last line, and nothing of where in the code."""
    text = errors.read_text()
    assert text.splitlines()[-1].startswith("PIFA.py: ") and word in text.splitlines()[-1]
    assert "Traceback" not in text


def only(parent: Path) -> Path:
    (folder,) = parent.iterdir()
    return folder


# ---------------------------------------------------------------- SIGKILL


@pytest.mark.parametrize("mode", MODES)
def test_runs_killed_again_and_again_come_to_the_same_bytes(mode, command, tmp_path):
    """14 kills a mode, with seeded draws: 8 before a random one of the file operations that Python announces in the
    folder (opening, renaming, removing, ...), 6 at a random moment of the run. A run that finishes is begun anew."""
    out, errors, counted = tmp_path / "out", tmp_path / "errors", tmp_path / "count"
    argv = command(mode, resume=True)
    assert children.finish(argv, errors, folder=out, count_into=counted) == 0
    operations = int(counted.read_text())
    shutil.rmtree(out)
    began = time.perf_counter()  # the first one had to wait for the server
    assert children.finish(argv, errors) == 0
    seconds = time.perf_counter() - began
    expected = tiny.contents(only(out), TIMES)
    record = json.loads((only(out) / files.RECORD).read_text())
    shutil.rmtree(out)

    draw = random.Random(f"kills in {mode}")
    killed = {"operation": 0, "moment": 0}
    finished = 0
    while killed["operation"] < 8 or killed["moment"] < 6:
        if killed["operation"] < 8:
            kind = "operation"
            # a resumed run has fewer to do
            code = children.finish(argv, errors, folder=out, kill_at=draw.randint(1, operations))
        else:
            kind = "moment"
            child = children.start(argv, errors)
            child.join(draw.uniform(0, seconds))
            child.kill()
            child.join()
            code = child.exitcode
        assert code in (0, -signal.SIGKILL)
        killed[kind] += code != 0
        if code == 0:
            finished += 1
            assert tiny.contents(only(out), TIMES) == expected
            shutil.rmtree(out)
        assert finished < 40
    assert children.finish(argv, errors) == 0
    assert tiny.contents(only(out), TIMES) == expected
    again = json.loads((only(out) / files.RECORD).read_text())
    assert again.keys() == record.keys() and again["ranks"] == record["ranks"]


@pytest.mark.parametrize("mode", MODES)
def test_the_lock_of_a_run_killed_behind_its_record_goes(mode, command):
    folder = Path(PIFA.run(command(mode))["path"])
    (folder / LOCK).write_text("process 1 on another machine")
    (folder / f".{files.RECORD}{PARTIAL}").mkdir()
    assert PIFA.run([*command(mode), "--resume"])["path"] == str(folder)
    assert not list(folder.glob(".*"))


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("mode", MODES)
def test_a_flipped_bit_is_found_and_the_shard_made_again(mode, command, tmp_path):
    record = PIFA.run(command(mode))
    folder = Path(record["path"])
    whole = tiny.contents(folder, TIMES)
    draw = random.Random(3)
    for shard in sorted(path.name for path in folder.glob("*.safetensors")):
        (folder / files.RECORD).unlink()  # as if it had been interrupted
        flip_a_bit(folder / shard, draw)
        others = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors") if path.name != shard}
        PIFA.run([*command(mode), "--resume"])
        assert tiny.contents(folder, TIMES) == whole
        assert {path: path.stat().st_mtime_ns for path in others} == others


def flip_a_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def test_a_damaged_profile_is_made_again(arguments, tmp_path):
    flags = {"density": 0.6, "save_path": tmp_path}
    PIFA.run(arguments("m", **flags))
    (profile,) = tmp_path.glob("profile_*")
    whole = tiny.contents(profile, TIMES)
    flip_a_bit(profile / files.layer_shard(0), random.Random(0))
    PIFA.run(arguments("m", prefix="second", **flags))
    assert tiny.contents(profile, TIMES) == whole


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"flags": '])
def test_a_damaged_manifest_is_one_line(content, command, tmp_path, bad):
    PIFA.run(command("m"))
    (only(tmp_path / "out") / files.MANIFEST).write_bytes(content)
    (only(tmp_path / "out") / files.RECORD).unlink()
    bad([*command("m"), "--resume"], "manifest.json is damaged")


# ---------------------------------------------------------------- two at once


@pytest.mark.parametrize("mode", MODES)
def test_of_two_runs_at_once_one_writes_and_the_other_says_who(mode, command, tmp_path):
    argv = command(mode, resume=True)
    both = [children.start(argv, tmp_path / f"errors{number}") for number in range(2)]
    for child in both:
        child.join(120)
    codes = [child.exitcode for child in both]
    assert sorted(codes) == [0, 2]
    winner = both[codes.index(0)]
    one_line(tmp_path / f"errors{codes.index(2)}", f"is being written by process {winner.pid} on ")
    assert files.read_checkpoint(only(tmp_path / "out")).verify() is None
    assert not (only(tmp_path / "out") / LOCK).exists()


def test_a_locked_folder_is_refused_and_a_dead_ones_lock_is_not_one(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on another machine")  # as SIGKILL leaves it
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(UsageError, match=f"is being written by process {os.getpid()} on"), locked(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_threads_that_ask_again_and_again_hold_the_lock_one_at_a_time(tmp_path):
    """Releasing removes the file, which others may have open by then."""
    inside, most, rounds = [0], [0], [0]

    def ask() -> None:
        until = time.perf_counter() + 1
        while time.perf_counter() < until:
            try:
                with locked(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0.0005)
                    rounds[0] += 1
                    inside[0] -= 1
            except UsageError:
                pass

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and rounds[0] > 10


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("largest", [100, 2000, 30000])
def test_a_file_that_may_not_grow_ends_in_one_line_and_is_gone_on_with(largest, mode, command, tmp_path, uniform):
    """The operating system refuses files above a size: of JSON, tokenizer or shards."""
    out, errors = tmp_path / "out", tmp_path / "errors"
    assert children.finish(command(mode), errors, largest_file=largest) == 1
    one_line(errors, "make room, then the same command with --resume goes on")
    assert not list(out.glob(f"*/.*{PARTIAL}")) and not list(out.glob(f"*/{LOCK}"))
    assert children.finish(command(mode, resume=True), errors) == 0
    if mode == "m":
        assert tiny.contents(only(out), TIMES) == tiny.contents(uniform, TIMES)


def test_a_full_file_system_ends_in_one_line_and_is_gone_on_with(command, tmp_path, uniform):
    out, errors = tmp_path / "out", tmp_path / "errors"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(out)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        assert children.finish(command("m"), errors) == 1
        one_line(errors, "make room, then the same command with --resume goes on")
        assert (only(out) / files.layer_shard(0)).exists()  # that far it came
        subprocess.run(["mount", "-o", "remount,size=10m", str(out)], check=True)
        assert children.finish(command("m", resume=True), errors) == 0
        assert tiny.contents(only(out), TIMES) == tiny.contents(uniform, TIMES)
    finally:
        subprocess.run(["umount", str(out)], check=True)


# ---------------------------------------------------------------- SIGTERM


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_sigterm_ends_in_one_line_and_leaves_nothing_half_done(share, command, tmp_path, uniform):
    out, errors = tmp_path / "out", tmp_path / "errors"
    began = time.perf_counter()
    assert children.finish(command("m"), errors) == 0
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    child = children.start(command("m"), errors)
    while not list(out.glob(f"*/{LOCK}")):  # before, nothing is being made
        assert child.is_alive()
        time.sleep(0.001)
    child.join(0.7 * share * seconds)
    child.terminate()
    child.join(30)
    assert child.exitcode in (0, 1)
    if child.exitcode == 1:
        one_line(errors, "ended by SIGTERM: the same command with --resume goes on")
    assert not list(out.glob("*/.*"))
    assert children.finish(command("m", resume=True), errors) == 0
    assert tiny.contents(only(out), TIMES) == tiny.contents(uniform, TIMES)


@pytest.mark.parametrize("at", ["solve", "forward"])
def test_sigterm_while_passes_wait_ends_their_threads(at, command, tmp_path, monkeypatch):
    """The signal comes between two linears of a layer, when every batch's pass waits in a thread of its own."""
    import component.flow.lockstep
    import component.flow.solving

    module, name = {
        "solve": (component.flow.solving, "_replace"),
        "forward": (component.flow.lockstep, "run_layer"),
    }[at]
    run, calls, waiting = getattr(module, name), [0], [0]

    def interrupted(*arguments):
        calls[0] += 1
        if calls[0] == 2:
            waiting[0] = threading.active_count()
            os.kill(os.getpid(), signal.SIGTERM)
        return run(*arguments)

    monkeypatch.setattr(module, name, interrupted)
    before = threading.active_count()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunError, match="ended by SIGTERM"):
        PIFA.run(command("m"))
    assert waiting[0] > before and threading.active_count() == before
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [path.name for path in only(tmp_path / "out").iterdir()] == [files.MANIFEST]  # with what it had chosen


def test_no_library_swallows_the_signal():
    with pytest.raises(RunError, match="ended by SIGTERM"), one_line_endings():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except Exception:
            pytest.fail("caught")


def test_an_error_that_takes_the_place_of_the_signals_is_told_as_the_signal():
    """As where C code finds that a callback failed, and says so in its own way."""
    with pytest.raises(RunError, match="ended by SIGTERM"), one_line_endings():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except BaseException:
            raise ValueError("no shape") from None


@pytest.mark.parametrize(("error", "ending"), [(OSError(28, "No space left"), RunError), (OSError(5, "I/O"), OSError)])
def test_other_errors_are_left_as_they_are(error, ending):
    with pytest.raises(ending) as caught, one_line_endings():
        raise error
    assert type(caught.value) is ending
