"""How long calls take and how much memory they need, and what the machine can do at best.

Calls that are compared are timed in turn, so that clocks and heat change for all alike, and the median is taken. On
CUDA a turn is many calls in a row: a card at its power limit lends a product that follows a pass through memory a
higher clock for a while, and what counts is the clock that a call keeps in the company of its like, as in a model.
Calls queue up there, so that the host launches one while another runs. Short CUDA calls are captured in a graph over
several copies of their weights: one call is then as long as its kernels, and no weight comes out of the cache because
the call before left it there.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Any]

LEAST_ROUNDS, MOST_ROUNDS = 8, 50
TURN_SECONDS, MOST_IN_A_TURN = {"cuda": 0.2, "cpu": 0.0}, 50  # as many calls as fill the time
WARM_UPS = 3  # of a call before it is captured: libraries choose their kernels and workspaces then
L2_SHARE = 4  # copies of the weights take this many times the cache
MATMUL_SIZES = {"cuda": (8192, 16384), "cpu": (1024,)}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}


class Limits(NamedTuple):
    """What this machine reached in this run."""

    matmul_tflops: float  # largest square product, in the dtype of the run
    copy_gbs: float  # bytes read and written by a large copy, in 1e9 per second

    def floor(self, flops: float, moved_bytes: float) -> float:
        """Seconds below which no call can do this much."""
        return max(flops / (self.matmul_tflops * 1e12), moved_bytes / (self.copy_gbs * 1e9))


def measure_limits(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Limits:
    """Time square products of normal numbers and a copy, in turn; `seconds` bounds how long each goes on."""
    calls: dict[str, Call] = {}
    for size in MATMUL_SIZES[device.type]:
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        calls[f"matmul {size}"] = partial(F.linear, left, right)  # the layout of layers: x W^T
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls["copy"] = partial(target.copy_, source)
    found = interleaved_medians(calls, device, seconds * len(calls))
    tflops = max(2 * size**3 / found[f"matmul {size}"] / 1e12 for size in MATMUL_SIZES[device.type])
    return Limits(tflops, 2 * len(source) / found["copy"] / 1e9)


def interleaved_medians(calls: Mapping[str, Call], device: torch.device, seconds: float = 2.0) -> dict[str, float]:
    """Median seconds of each call, over rounds in which every call has one turn, each round in an order of its own.

    seconds: about how long the rounds take together; at least eight are made. On CUDA the cache is overwritten before
    every call, times are those of the device's own clock, and the first third of a turn does not count.
    """
    for call in calls.values():
        call()
    once = {name: timed(call, device) for name, call in calls.items()}
    repeats = {name: _in_a_turn(taken, device) for name, taken in once.items()}
    round_seconds = sum(once[name] * repeats[name] for name in calls)
    rounds = min(max(int(seconds / max(round_seconds, 1e-9)), LEAST_ROUNDS), MOST_ROUNDS)
    flush, draw = cache_flusher(device), random.Random(0)
    found: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in draw.sample(list(calls), len(calls)):
            turn = []
            for _ in range(repeats[name]):
                flush()
                turn.append(clocked(calls[name], device))
            found[name] += turn[len(turn) // 3 :]
    return {name: statistics.median(seconds() for seconds in clocks) for name, clocks in found.items()}


def _in_a_turn(once: float, device: torch.device) -> int:
    return min(max(round(TURN_SECONDS[device.type] / max(once, 1e-9)), 1), MOST_IN_A_TURN)


def timed(call: Call, device: torch.device) -> float:
    """Seconds of one call."""
    return clocked(call, device)()


def clocked(call: Call, device: torch.device) -> Callable[[], float]:
    """Make the call; what is returned tells its seconds, and waits for a CUDA device to finish it."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        taken = time.perf_counter() - began
        return lambda: taken
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()

    def seconds() -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return seconds


def cache_bytes(device: torch.device) -> int:
    """Size of the CUDA device's L2 cache; 0 on the CPU, where calls are timed as they come."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def cache_flusher(device: torch.device) -> Call:
    """A call that fills the device's cache with something else."""
    size = 2 * cache_bytes(device)
    if not size:
        return lambda: None
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def copies_beyond_cache(weight_bytes: int, device: torch.device) -> int:
    """How many copies of weights of this size the cache can't hold a quarter of; at least 2, at most 32."""
    return min(max(-(-L2_SHARE * cache_bytes(device) // max(weight_bytes, 1)), 2), 32)


class Replay:
    """A captured graph, and the call it was made from: the graph reads the call's tensors but does not keep them."""

    def __init__(self, graph: Any, call: Call):
        self.graph, self.call = graph, call

    def __call__(self) -> None:
        self.graph.replay()


def as_graph(call: Call, device: torch.device) -> Call:
    """The call's kernels as one CUDA graph, whose replay launches them all; on the CPU the call itself.

    The call must do the same at every time and hold its inputs, where they are. No gradients.
    """
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return Replay(graph, call)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Bytes that one call allocates at its peak, beyond what there is already; None on the CPU, which counts none."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def poison(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> None:
    """Fill memory with NaN and free it: outputs that a call leaves unwritten, allocated there next, then show."""
    blocks: list[Tensor] = [torch.full(shape, torch.nan, device=device, dtype=dtype) for shape in shapes]
    del blocks
