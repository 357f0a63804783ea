"""A model's decoder linears as what ranks are shared out among."""

import logging

from torch import nn
from transformers import PreTrainedModel

from component.ranks.budget import Module
from utils.layers import DecoderLayer, uncalled_linears

log = logging.getLogger("pifa")


def modules_of(model: PreTrainedModel, described: list[DecoderLayer]) -> list[Module]:
    """All linears that a forward pass calls, in call order; a line of warning for each one that none calls."""
    modules = []
    for index, layer in enumerate(described):
        for name in layer.linears():
            full_name = f"{layer.name}.{name}"
            linear = model.get_submodule(full_name)
            assert isinstance(linear, nn.Linear)
            d_out, d_in = linear.out_features, linear.in_features
            modules.append(Module(full_name, d_out, d_in, attention=name in layer.attention, layer=index))
        for name in uncalled_linears(model.get_submodule(layer.name), layer):
            log.warning("%s.%s is not called in a forward pass and stays as it is", layer.name, name)
    return modules
