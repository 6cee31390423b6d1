"""Named random streams: adding a draw in one place shifts nobody else's numbers."""

import hashlib

import torch


def stream(seed: int, *names: str | int) -> torch.Generator:
    """The generator named `names` under `seed`, for example `stream(0, "attack", victim)`.

    It lives on the CPU, so that the same numbers are drawn whatever the device: draw there, move
    the result. Equal arguments give equal streams; different ones, independent streams.
    """
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
