"""What a run will take, from shapes alone: bytes on the device, in host memory and on disk.

Numbers in, numbers out. The largest layer stands for all. On the device live at once, while a group of linears that
share d_in inputs is solved:

- the layer, dense and as far as it is compressed, and the hidden states where they fit (placement.py);
- the passes that wait in mid-layer (lockstep.py), as many batches as `WAITING_SHARE` of the free memory holds;
- moments: (d_in, d_in) in float64, two of them for exact M (Gram and cross), and (width, d_in) of the drift;
- while they are summed: one batch's product in float32, and its two sides in float32;
- while they are used: their Cholesky factor, (d_in, d_in) in float64; target, moment and whitened moment, (d_out, d_in)
  in float64; an eigendecomposition of the smaller side, four of its squares in float64.

With 128 windows of 2048 in float16 and 79 GiB free these are, in GiB, at the down projection:

| LLaMA-2 | layer | states | passes (if all waited) | Gram, cross, factor | drift | targets | eigen | sum |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 70B, 28,672 -> 8192 | 3.2 | 8 | 8.6 (46) | 3 x 6.1 | 1.75 | 5.25 | 2.0 | 47 |
| 7B, 11,008 -> 4096 | 0.8 | 4 | 9.1 (21) | 3 x 0.9 | 0.34 | 1.0 | 0.5 | 18 |
"""

from dataclasses import dataclass

from utils.placement import stays_on_card

FLOAT32, FLOAT64 = 4, 8
WAITING_SHARE = 0.125  # of the card's free memory: the room it leaves is worth more than the passes that begin anew
WORKSPACE = 2**25  # bytes that cuBLAS is given for each thread, on Hopper; less elsewhere

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
    (d_in, d_in), and (width, d_in). stored: numbers of all compressed linears. weighted: whether outputs are.
    """

    tokens: int
    batch_tokens: int
    flows: int
    states: int
    profiled: int
    square: int
    drift: int
    stored: int
    weighted: bool = False


@dataclass(frozen=True)
class Machine:
    """free: bytes on the card, None without one. limit: bytes of hidden states that host memory may hold, None for any.
    resident: bytes of host memory that the process holds before it reads the model."""

    free: int | None
    limit: int | None = None
    resident: int = 0


@dataclass(frozen=True)
class Estimate:
    """Bytes. device: None on the CPU, where it is part of host; mapped: of hidden states in files, part of disk."""

    device: int | None
    host: int
    mapped: int
    disk: int


def waiting_numbers(shapes: Shapes, number: int) -> int:
    """Numbers per token that a pass holds while it waits at the group of this number, beside the layer's input.

    These are the residual stream behind attention, its normalised copy, the linear's input, and, inside attention,
    what the linears before returned (queries, keys and values live until the block is through).
    """
    inside = number < shapes.attention
    before = shapes.groups[:number] if inside else ()
    kept = sum(d_out for earlier in before for d_out, _ in earlier)
    own = shapes.groups[number][0][1] if number not in (0, shapes.attention) else 0  # else it is the normalised copy
    return shapes.width + own + kept + (0 if inside else shapes.width)


def states_bytes(shapes: Shapes, work: Work) -> int:
    return work.states * work.tokens * shapes.width * shapes.size


def states_on_card(shapes: Shapes, work: Work, machine: Machine) -> bool:
    return machine.free is not None and stays_on_card(states_bytes(shapes, work), machine.free)


def pass_bytes(shapes: Shapes, work: Work, machine: Machine, *, number: int) -> int:
    """What one batch's passes, threads, hold at a group; a layer's input counts where it is a copy from elsewhere."""
    on_card = machine.free is not None
    copied = on_card and not states_on_card(shapes, work, machine)
    numbers = waiting_numbers(shapes, number) + (shapes.width if copied else 0)
    return work.flows * (work.batch_tokens * numbers * shapes.size + (WORKSPACE if on_card else 0))


def waiting_batches(shapes: Shapes, work: Work, machine: Machine) -> int | None:
    """How many batches' passes wait in mid-layer, one at least; None without a card: all do."""
    if machine.free is None:
        return None
    most = max(pass_bytes(shapes, work, machine, number=number) for number in range(len(shapes.groups)))
    return max(1, int(WAITING_SHARE * machine.free / most))


def moment_bytes(shapes: Shapes, work: Work, number: int) -> int:
    d_in = shapes.groups[number][0][1]
    return FLOAT64 * (work.square * d_in**2 + work.drift * shapes.width * d_in)


def solving_bytes(shapes: Shapes, work: Work, number: int) -> int:
    """A group's moments, and what the solver makes of them: see above."""
    d_in = shapes.groups[number][0][1]
    d_out = max(d_out for d_out, _ in shapes.groups[number])
    weighting = work.weighted * (d_out**2 + d_out * d_in)
    target = 3 * d_out * d_in + max(d_out * d_in, 4 * min(d_out, d_in) ** 2)
    return moment_bytes(shapes, work, number) + FLOAT64 * (d_in**2 + target + weighting)


def gathering_bytes(shapes: Shapes, work: Work, number: int) -> int:
    """A group's moments while a batch, which runs, is added."""
    d_in = shapes.groups[number][0][1]
    widest = max(sum(d_out for d_out, _ in group) + group[0][1] for group in shapes.groups)
    added = FLOAT32 * (d_in**2 + 2 * work.batch_tokens * d_in)
    return moment_bytes(shapes, work, number) + added + work.batch_tokens * widest * shapes.size


def working_bytes(shapes: Shapes, work: Work, machine: Machine) -> int:
    """While a layer is solved, without hidden states: the layer in both flows, and the group that takes most."""
    waiting = waiting_batches(shapes, work, machine)
    batches = work.tokens / work.batch_tokens
    batches = batches if waiting is None else min(batches, waiting)
    most = max(
        int(batches * pass_bytes(shapes, work, machine, number=number))
        + max(solving_bytes(shapes, work, number), gathering_bytes(shapes, work, number))
        for number in range(len(shapes.groups))
    )
    return 2 * shapes.layer_numbers * shapes.size + most


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


def estimate(shapes: Shapes, work: Work, machine: Machine, *, whole: bool = False) -> Estimate:
    """whole: the model is in memory, not read by layers.

    Host memory holds, beside the process as it is and the model's rest: hidden states that are neither on the card nor
    in files, and a layer, whose groups are found there (layers.py) and whose shard is written from there.
    """
    states, profile = states_bytes(shapes, work), (shapes.layers + 3) * work.profiled * shapes.width * FLOAT32
    uses = [(states, working_bytes(shapes, work, machine)), (profile, profiling_bytes(shapes, work))]
    device = host = mapped = 0
    for size, working in uses:
        if machine.free is not None and stays_on_card(size, machine.free):
            device = max(device, size + working)
            continue
        spilled = machine.limit is not None and size > machine.limit
        mapped = max(mapped, size if spilled else 0)
        device = max(device, working)
        host = max(host, (0 if spilled else size) + (0 if machine.free is not None else working))
    held = shapes.rest + (shapes.layers * shapes.layer_numbers if whole else 0)
    if machine.free is not None:  # else it is part of what works
        held += max(shapes.layer_numbers, work.stored // shapes.layers)
    host += machine.resident + held * shapes.size
    disk = (work.stored + shapes.rest) * shapes.size + mapped
    return Estimate(device=None if machine.free is None else device, host=host, mapped=mapped, disk=disk)
