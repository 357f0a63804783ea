"""Forward passes through one layer that stop at its linears, so that these can be solved and replaced in mid-flight.

What a linear receives depends on what those before it became. Running the layer from its start for every group of
linears would do most of its arithmetic several times; here a batch's pass waits, with the tensors it holds, where
it reached the group, and goes on through what was put in its place. Where memory has no room for all to wait, the
passes of the other batches begin anew for every group: they come to the same, bit by bit, through the same operations.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.errors import RunError
from utils.layers import run_layer


class Stop(NamedTuple):
    """Where a pass of so many windows waits: the linear, its input, the residual stream that it writes into, if any."""

    linear: str
    x: Tensor
    stream: Tensor | None
    windows: int


class _Abandoned(Exception):
    """Ends the thread of a pass that nobody will let go on."""


class _Pass:
    """One forward pass in a thread of its own. Only one thread runs at a time: the others wait for a semaphore."""

    def __init__(self, run: Callable[[], Tensor], threads: Executor, through: frozenset[str] = frozenset()):
        self._through = set(through)  # linears where it does not stop, for once
        self.windows = 0
        self.hidden: Tensor | None = None  # what the layer returned
        self.streams: dict[str, Tensor] = {}
        self._stop: Stop | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._may_run, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._ended = threads.submit(self._follow, run)

    def go_on(self) -> Stop | None:
        """Run to the next stop; None where the pass is through."""
        self._stop = None
        self._may_run.release()
        self._has_stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._stop

    def wait_at(self, stop: Stop) -> None:
        """Called inside the pass, which waits unless it goes through there."""
        if stop.linear in self._through:
            self._through.remove(stop.linear)
            return
        self._stop = stop
        self._has_stopped.release()
        self._may_run.acquire()
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        self._abandoned = True
        self._may_run.release()
        self._ended.result()

    def _follow(self, run: Callable[[], Tensor]) -> None:
        self._may_run.acquire()
        try:
            with torch.no_grad():  # a thread starts with gradients on
                if not self._abandoned:
                    self.hidden = run()
        except _Abandoned:
            pass
        except BaseException as error:  # handed to whoever waits for this pass
            self._error = error
        finally:
            self._has_stopped.release()


class Lockstep:
    """All batches of one flow through one layer, stopped together at one linear after the other.

    threads: as many at least as batches that wait and one. waiting: how many of them wait between stops, None for all.
    """

    running: _Pass  # the one that is under way

    def __init__(
        self,
        layer: nn.Module,
        batches: list[Tensor],
        *,
        keywords: dict[str, Any],
        threads: Executor,
        waiting: int | None,
    ):
        self._layer, self._threads = layer, threads
        device = next(layer.parameters()).device
        runs = [self._run(batch, device, keywords) for batch in batches]
        self._waiting = [_Pass(run, threads) for run in runs[:waiting]]
        self._others = runs[len(self._waiting) :]
        self._behind: frozenset[str] = frozenset()  # linears that all passes have reached
        self._anew: _Pass | None = None  # begun for the stop under way

    def _run(self, batch: Tensor, device: torch.device, keywords: dict[str, Any]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            hidden = batch.to(device)
            self.running.windows, self.running.streams[""] = len(batch), hidden
            return run_layer(self._layer, hidden, keywords)

        return run

    def at(self, linear: str) -> Iterator[Stop]:
        """Let one batch after the other go on until it reaches the linear, which must be its next stop.

        Raises: RunError where a batch gets elsewhere.
        """
        through, self._behind = self._behind, self._behind | {linear}
        for one in self._passes(through):
            stop = one.go_on()
            if stop is None or stop.linear != linear:
                raise RunError(f"{linear} is not called once, in the same order, by every batch: no way to compress it")
            yield stop

    def outputs(self) -> Iterator[Tensor]:
        """Let one batch after the other go on to its end; the layer's output hidden states of each."""
        for one in self._passes(self._behind):
            if one.go_on() is not None or one.hidden is None:
                raise RunError("a linear of this layer is called more often than in a short pass: can't compress it")
            yield one.hidden
            one.hidden = None
            one.streams.clear()

    def _passes(self, through: frozenset[str]) -> Iterator[_Pass]:
        """The pass of one batch after the other, as the one that runs: those that wait, then those that begin anew."""
        for one in self._waiting:
            self.running = one
            yield one
        for run in self._others:
            self.running = self._anew = _Pass(run, self._threads, through)
            yield self._anew
            self._anew.abandon()
            del self.running  # and what it held
            self._anew = None

    def reached(self, linear: str, x: Tensor, stream: str | None) -> None:
        one = self.running
        one.wait_at(Stop(linear, x, stream=None if stream is None else one.streams[stream], windows=one.windows))

    def close(self) -> None:
        for one in (*self._waiting, self._anew):
            if one:
                one.abandon()


@contextmanager
def lockstep(
    layer: nn.Module,
    stops: Mapping[str, str | None],
    batches: Iterable[Tensor],
    *,
    keywords: dict[str, Any],
    waiting: int | None = None,
    threads: Executor | None = None,
) -> Iterator[Lockstep]:
    """Passes of the batches through the layer, each stopping where it reaches one of the linears in `stops`.

    stops: linear -> the submodule whose input is the residual stream wanted with it, "" for the layer's own input,
    None for none; batches: hidden states (windows, length, width) on any device, run on the layer's. A linear that
    has been replaced in the layer by the time a pass goes on is passed through in its new form. waiting: how many of
    the batches keep what they hold from stop to stop, None for all; the others run from the layer's start each time.
    threads: what `pass_threads` gives, for layers that come one after the other: on a CPU, passes in new threads take a
    fifth longer, since their memory and the helpers of their products are new as well.
    """
    batches = list(batches)
    with pass_threads(len(batches)) if threads is None else nullcontext(threads) as running:
        flow = Lockstep(layer, batches, keywords=keywords, threads=running, waiting=waiting)
        with _stopping(layer, stops, flow):
            try:
                yield flow
            finally:
                flow.close()


def pass_threads(batches: int, flows: int = 1) -> ThreadPoolExecutor:
    """Threads for the passes of so many batches in each flow: all may wait, beside one that begins anew."""
    return ThreadPoolExecutor(flows * (batches + 1))


@contextmanager
def _stopping(layer: nn.Module, stops: Mapping[str, str | None], flow: Lockstep) -> Iterator[None]:
    """The layer's linears tell the flow when they are reached."""

    def telling(name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            flow.reached(name, x, stops[name])
            now = layer.get_submodule(name)
            return type(linear).forward(linear, x) if now is linear else now(x)

        return forward

    linears = {name: layer.get_submodule(name) for name in stops}
    for name, linear in linears.items():
        linear.forward = telling(name, linear)  # type: ignore[method-assign, assignment, arg-type]
    handles = [
        layer.get_submodule(stream).register_forward_pre_hook(
            lambda _module, args, stream=stream: flow.running.streams.update({stream: args[0]})
        )
        for stream in set(stops.values())
        if stream
    ]
    try:
        yield
    finally:
        for linear in linears.values():
            del linear.forward
        for handle in handles:
            handle.remove()
