"""How many windows go through a layer at once."""

BATCH_TOKENS = 8192  # calibration tokens that go through a layer at once


def windows_at_once(length: int) -> int:
    """Windows of `length` tokens that go through a layer together: one at least."""
    return max(1, BATCH_TOKENS // length)
