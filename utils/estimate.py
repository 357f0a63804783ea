"""What a run will take, from shapes alone: bytes on the device, in host memory and on disk.

Numbers in, numbers out. The largest layer stands for all; what the libraries themselves take is not counted.
"""

from dataclasses import dataclass

FLOAT32, FLOAT64 = 4, 8

Group = tuple[tuple[int, int], ...]  # (d_out, d_in) of linears that share an input


@dataclass(frozen=True)
class Shapes:
    """A model: its width, the groups of its largest layer in call order, and how many numbers are in no layer.

    attention: how many of the groups, from the first on, are the attention block's. size: bytes of a number.
    """

    width: int
    layers: int
    groups: tuple[Group, ...]
    attention: int
    rest: int
    size: int

    @property
    def layer_numbers(self) -> int:
        return sum(d_out * d_in for group in self.groups for d_out, d_in in group)


@dataclass(frozen=True)
class Work:
    """What is done with it. tokens: that go through the layers; batch_tokens: at once; flows: 1 or 2; states: tensors
    of hidden states, two flows and what else is kept of them.

    profiled: tokens of the profile, 0 for none. square, drift: how many float64 moments a group has that are
    (d_in, d_in), and (width, d_in). stored: numbers of all compressed linears.
    """

    tokens: int
    batch_tokens: int
    flows: int
    states: int
    profiled: int
    square: int
    drift: int
    stored: int


@dataclass(frozen=True)
class Estimate:
    """Bytes. device: None on the CPU, where it is part of host; mapped: of hidden states in files, part of disk."""

    device: int | None
    host: int
    mapped: int
    disk: int


def waiting_numbers(shapes: Shapes) -> int:
    """Numbers per token that a pass holds while it waits at a linear, where they are most.

    These are the residual stream, its normalised copy, the linear's input, and, inside attention, what the linears
    before returned (queries, keys and values live until the block is through).
    """
    most = 0
    for number, group in enumerate(shapes.groups):
        before = shapes.groups[:number] if number < shapes.attention else ()
        kept = sum(d_out for earlier in before for d_out, _ in earlier)
        shares = group[0][1] if number not in (0, shapes.attention) else 0  # else the input is the normalised copy
        most = max(most, 2 * shapes.width + shares + kept)
    return most


def solving_bytes(shapes: Shapes, work: Work) -> int:
    """Moments of the group that takes most, and the solver's workspace: target, whitened target, their factors."""
    most = 0
    for group in shapes.groups:
        d_in = group[0][1]
        moments = work.square * d_in**2 + work.drift * shapes.width * d_in
        workspace = 3 * d_in**2 + 3 * max(d_out * d_in for d_out, _ in group)
        most = max(most, FLOAT64 * (moments + workspace))
    return most


def working_bytes(shapes: Shapes, work: Work) -> int:
    """While a layer is solved: the layer in both flows, waiting passes, one running one, moments and workspace."""
    layer = 2 * shapes.layer_numbers * shapes.size
    waiting = work.flows * work.tokens * waiting_numbers(shapes) * shapes.size
    widest = max(sum(d_out for d_out, _ in group) + group[0][1] for group in shapes.groups)
    running = work.batch_tokens * widest * FLOAT32
    return layer + waiting + running + solving_bytes(shapes, work)


def profiling_bytes(shapes: Shapes, work: Work) -> int:
    """While a layer is profiled: the layer and its batch in float32, with gradients, and its moments."""
    if not work.profiled:
        return 0
    outputs = sum(d_out for group in shapes.groups for d_out, _ in group)
    inputs = sum(group[0][1] for group in shapes.groups)
    moments = sum(FLOAT64 * d_out**2 for group in shapes.groups for d_out, _ in group)
    moments += sum(FLOAT64 * group[0][1] ** 2 for group in shapes.groups)
    batch = 2 * work.batch_tokens * (outputs + inputs + 4 * shapes.width) * FLOAT32
    return shapes.layer_numbers * FLOAT32 + batch + moments


def estimate(shapes: Shapes, work: Work, on_card: bool, limit: int | None, whole: bool = False) -> Estimate:
    """limit: bytes of hidden states that host memory may hold; whole: the model is in memory, not read by layers."""
    states = work.states * work.tokens * shapes.width * shapes.size
    profile = (shapes.layers + 3) * work.profiled * shapes.width * FLOAT32
    mapped = max((size for size in (states, profile) if limit is not None and size > limit), default=0)
    kept = max((size for size in (states, profile) if limit is None or size <= limit), default=0)
    working = max(working_bytes(shapes, work), profiling_bytes(shapes, work))
    held = shapes.rest + (shapes.layers * shapes.layer_numbers if whole else 0)
    host = held * shapes.size + kept + (0 if on_card else working)
    disk = (work.stored + shapes.rest) * shapes.size + mapped
    return Estimate(working if on_card else None, host, mapped, disk)
