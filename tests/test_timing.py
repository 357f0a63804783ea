"""utils/timing.py: what is called how often and in which order, and what is made of the times."""

import collections
import gc
import itertools
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from utils import timing

CPU = torch.device("cpu")


def test_calls_take_turns_and_the_median_counts(monkeypatch):
    """One call each to warm up, one to see how long a round takes, then rounds."""
    made, taken = [], {"a": itertools.count(1), "b": itertools.chain([7.0, 9.0, 100.0], itertools.repeat(8.0))}

    def clocked(call, _device):
        call()
        seconds = float(next(taken[made[-1]]))
        return lambda: seconds

    monkeypatch.setattr(timing, "clocked", clocked)
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 5)
    calls = {name: lambda name=name: made.append(name) for name in "ab"}
    found = timing.interleaved_medians(calls, CPU, seconds=0)
    assert made == list("abab" + "ab" + "ba" + "ba" + "ab" + "ab")
    assert found == {"a": 4.0, "b": 8.0}  # of 2..6, and of 9, 100, 8, 8, 8: the round before is not among them


def test_rounds_fill_the_time_but_have_bounds():
    made = []
    timing.interleaved_medians({"a": lambda: made.append(0)}, CPU, seconds=1e9)
    assert len(made) == 2 + timing.MOST_ROUNDS
    made.clear()
    timing.interleaved_medians({"a": lambda: made.append(0)}, CPU, seconds=0)
    assert len(made) == 2 + timing.LEAST_ROUNDS
    made.clear()
    many = timing.LEAST_ROUNDS + 2
    timing.interleaved_medians({str(i): lambda: made.append(0) for i in range(many)}, CPU, seconds=0)
    assert len(made) == (2 + many) * many


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_every_call_follows_every_other_equally_often(count):
    rounds = [timing.turns(number, count) for number in range(count if count % 2 == 0 else 2 * count)]
    assert all(sorted(order) == list(range(count)) for order in rounds)
    pairs = collections.Counter(pair for order in rounds for pair in itertools.pairwise(order))
    assert len(pairs) == count * (count - 1) and len(set(pairs.values())) <= 1


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
