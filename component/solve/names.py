"""What --prune can be called, and what goes with it by default: plain values, so that the front door stays quick."""

FACTORING = ("svd-llm", "svd", "asvd")  # solvers.py has the class of each
NARROWING = "flatllm"  # whole channels go, and no factors are made (channels/narrowing.py)
AUTO = "auto"  # per block the better of svd-llm's factors with exact M and fewer channels (channels/mixing.py)
PRUNERS = (*FACTORING, NARROWING, AUTO)
EXACT = None  # --reconstruct_step left out
PLAIN = {"drift_factor": 0.0, "output_shrinkage": 1.0, "token_power": 0.0}  # the papers' methods have none of these
TUNED = {"drift_factor": 0.5, "output_shrinkage": 0.1, "token_power": 0.5}  # of exact M, chosen on held-out text


def default_step(prune: str) -> int | None:
    """The exact minimiser ignores the factors it starts from: it is svd-llm's default, and not of svd or asvd."""
    return EXACT if prune in ("svd-llm", AUTO) else 0
