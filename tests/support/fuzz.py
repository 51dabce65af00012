"""Length of the fuzz tests: `MOME_FUZZ=20 pytest …` tries twenty times the inputs of `make test`."""

import os
import random


def fuzz_rounds(default: int) -> int:
    """Return the number of inputs to try: `default` times the factor in MOME_FUZZ (default: 1)."""
    return int(default * float(os.environ.get("MOME_FUZZ", "1")))


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return a damaged copy of `data`: bytes flipped, removed, inserted or repeated, or the end cut off."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(len(damaged) + 1)
        length = rng.choice((1, 1, 2, 8, 64))
        operation = rng.randrange(5)
        if operation == 0 and position < len(damaged):
            damaged[position] ^= rng.randrange(1, 256)
        elif operation == 1:
            del damaged[position : position + length]
        elif operation in (2, 3):
            inserted = rng.randbytes(length) if operation == 2 else damaged[position : position + length]
            damaged[position:position] = inserted
        else:
            del damaged[max(position, 1) :]
    return bytes(damaged)
