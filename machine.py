"""How a stage shares the machine with other programs: read before PyTorch is imported, so it imports nothing."""

import os

SPINS = "10000"


def share_cores() -> None:
    """Let a thread that waits for the others sleep after a moment instead of spinning.

    libgomp, which runs PyTorch's CPU threads, spins 300,000 times before it sleeps. Where another program has the core
    of one of two threads, the other spins through its whole share of the time.
    The environment's own OMP_WAIT_POLICY or GOMP_SPINCOUNT has precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
