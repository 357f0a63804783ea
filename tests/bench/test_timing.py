"""component/bench/timing.py: what is called how often and in which order, and what is made of the times."""

import gc
import itertools
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from component.bench import timing

CPU = torch.device("cpu")


@pytest.fixture
def made(monkeypatch):
    """The calls that are timed, by name, in their order; the n-th timing of each takes n^2 seconds."""
    made: list[str] = []

    def clocked(call, _device):
        call()
        seconds = float((made.count(made[-1]) - 1) ** 2)  # one was the warm-up
        return lambda: seconds

    monkeypatch.setattr(timing, "clocked", clocked)
    return made


def named(made, names):
    return {name: lambda name=name: made.append(name) for name in names}


def test_calls_take_turns_and_the_median_counts(monkeypatch, made):
    """One call each to warm up, one to see how long it takes, then rounds, in each of which every call comes once."""
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 5)
    found = timing.interleaved_medians(named(made, "abc"), CPU, seconds=0)
    assert made[:6] == list("abcabc") and len(made) == 21
    rounds = [tuple(made[start : start + 3]) for start in range(6, 21, 3)]
    assert all(sorted(order) == list("abc") for order in rounds) and len(set(rounds)) > 1
    assert found == {"a": 16.0, "b": 16.0, "c": 16.0}  # of 4, 9, 16, 25, 36: what came before the rounds is not there


def test_a_turn_is_many_calls_of_which_the_last_two_thirds_count(monkeypatch, made):
    monkeypatch.setattr(timing, "TURN_SECONDS", {"cpu": 6.0})
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 1)
    found = timing.interleaved_medians(named(made, "ab"), CPU, seconds=0)
    assert [(name, len(list(turn))) for name, turn in itertools.groupby(made[4:])] in (
        [("a", 6), ("b", 6)], [("b", 6), ("a", 6)],
    )  # fmt: skip
    assert found == {"a": 30.5, "b": 30.5}  # of 16, 25, 36, 49


def test_rounds_fill_the_time_but_have_bounds():
    made = []
    timing.interleaved_medians({"a": lambda: made.append(0)}, CPU, seconds=1e9)
    assert len(made) == 2 + timing.MOST_ROUNDS
    made.clear()
    timing.interleaved_medians({"a": lambda: made.append(0)}, CPU, seconds=0)
    assert len(made) == 2 + timing.LEAST_ROUNDS


def test_timed_calls_once():
    made = []
    assert timing.timed(lambda: made.append(0), CPU) >= 0
    assert len(made) == 1


@pytest.mark.parametrize(
    ("cache", "weights", "copies"), [(50, 18, 12), (50, 50, 4), (50, 1000, 2), (50, 1, 32), (0, 18, 2), (50, 0, 32)]
)
def test_copies_are_four_times_the_cache(cache, weights, copies, monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda _device: cache * 2**20)
    assert timing.copies_beyond_cache(weights * 2**20, CPU) == copies


def test_on_the_cpu_nothing_is_captured_and_no_memory_is_counted():
    def call():
        raise AssertionError("called")

    assert timing.as_graph(call, CPU) is call
    assert timing.peak_bytes(call, CPU) is None
    assert timing.cache_bytes(CPU) == 0
    assert timing.cache_flusher(CPU)() is None


def test_a_replay_keeps_what_its_graph_reads():
    """Freed weights would be given to the next row while the graph still reads them."""
    weights, replayed = torch.zeros(3), []
    kept = weakref.ref(weights)
    replay = timing.Replay(SimpleNamespace(replay=lambda: replayed.append(kept() is not None)), partial(abs, weights))
    del weights
    gc.collect()
    replay()
    assert replayed == [True]
    del replay
    gc.collect()
    assert kept() is None


def test_limits_are_those_of_the_best_product_and_of_both_ways_of_a_copy(monkeypatch):
    monkeypatch.setattr(timing, "MATMUL_SIZES", {"cpu": (8, 16)})
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 1000})
    found = {"matmul 8": 1e-6, "matmul 16": 4e-6, "copy": 1e-6}

    def medians(calls, _device, _seconds):
        assert calls.keys() == found.keys()
        assert calls["matmul 16"]().shape == (16, 16) and calls["matmul 8"]().dtype == torch.bfloat16
        assert calls["copy"]().shape == (1000,)
        return found

    monkeypatch.setattr(timing, "interleaved_medians", medians)
    limits = timing.measure_limits(CPU, torch.bfloat16)
    assert limits.matmul_tflops == pytest.approx(2 * 16**3 / 4e-6 / 1e12)
    assert limits.copy_gbs == pytest.approx(2.0)


def test_the_floor_is_the_slower_of_arithmetic_and_traffic():
    limits = timing.Limits(matmul_tflops=2.0, copy_gbs=100.0)
    assert limits.floor(4e12, 1e9) == 2.0
    assert limits.floor(1e12, 300e9) == 3.0
