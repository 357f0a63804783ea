"""What the tests of the format share."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a function asks for comes full of NaN."""

    def poisoning(allocate):
        def allocated(*args, **kwargs):
            memory = allocate(*args, **kwargs)
            return memory.fill_(torch.nan) if memory.is_floating_point() else memory

        return allocated

    monkeypatch.setattr(Tensor, "new_empty", poisoning(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))


@pytest.fixture
def compiled():
    """compiled(function): one graph or an error. On a CPU without code generation, which would need a C++ compiler."""
    torch._dynamo.reset()
    return lambda function: torch.compile(
        function, fullgraph=True, backend="inductor" if torch.cuda.is_available() else "aot_eager"
    )
