"""Which linears of a decoder layer write into the residual stream, found by looking at one forward pass."""

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def residual_writers(layer: nn.Module, hidden: Tensor, *, output_of, linears: list[str]) -> dict[str, str]:
    """Linear -> the submodule whose input is the stream that the linear's output is added to; "" is the layer's own.

    A linear y = f(x) writes into the stream where some tensor that the layer hands on afterwards (to a submodule, or
    as its output) equals an earlier one plus y. Families that normalise y before the addition (Gemma2) have none.

    hidden: the layer's input (batch, length, width); output_of: runs the layer and returns its output hidden states.
    """
    events: list[tuple[str, str, Tensor]] = [("input", "", hidden)]

    def watch_input(name: str):
        return lambda _module, args: events.append(("input", name, args[0])) if _is_stream(args, hidden) else None

    def watch_output(name: str):
        return lambda _module, _args, output: events.append(("output", name, output))

    handles = [
        module.register_forward_pre_hook(watch_input(name))
        for name, module in layer.named_modules()
        if name and name not in linears
    ]
    handles += [layer.get_submodule(name).register_forward_hook(watch_output(name)) for name in linears]
    try:
        events.append(("input", "end", output_of(layer)))
    finally:
        for handle in handles:
            handle.remove()
    writers: dict[str, str] = {}
    for position, (kind, name, written) in enumerate(events):
        if kind == "output" and written.numel() == hidden.numel():
            before = [(where, t) for what, where, t in events[:position] if what == "input"]
            after = [t for what, _, t in events[position:] if what == "input"]
            sums = ((where, (t.flatten() + written.flatten())) for where, t in before)
            found = next((where for where, total in sums if any(torch.equal(total, t.flatten()) for t in after)), None)
            if found is not None:
                writers[name] = found
    return writers


def _is_stream(args: tuple[Any, ...], hidden: Tensor) -> bool:
    """Some families flatten batch and length for a while."""
    return bool(args) and isinstance(args[0], Tensor) and args[0].numel() == hidden.numel()
