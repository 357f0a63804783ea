"""Where tensors that grow with the number of samples live."""

import torch

CARD_SHARE = 0.25  # of the card's free memory


def home(size: int, device: torch.device) -> torch.device:
    """The device itself, where it is a card that `size` bytes take no more than a quarter of; else the host."""
    if device.type != "cuda":
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info(device)
    return device if size < CARD_SHARE * free else torch.device("cpu")
