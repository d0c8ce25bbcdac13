"""Random numbers that depend on where they are used and on nothing before it.

Each draw is made by a CPU generator seeded from the run's seed, a purpose, the optimizer step and the micro-step. So a
resumed run needs only its step number to go on with the same numbers, on any device.
"""

import hashlib

import torch
from torch import Generator


def derive_seed(seed: int, purpose: str, step: int, micro: int) -> int:
    """A 63-bit seed that differs for every combination of the arguments."""
    text = f"{seed}/{purpose}/{step}/{micro}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def generator(seed: int, purpose: str, step: int, micro: int) -> Generator:
    """A CPU generator for one draw."""
    return Generator().manual_seed(derive_seed(seed, purpose, step, micro))


def seed_dropout(seed: int, step: int, micro: int) -> None:
    """Seed torch's global generators, from which dropout layers draw: the CPU's and, once it is in use, the GPU's.

    ``torch.manual_seed`` would also keep the seed, with a stack trace, for every kind of device that was never used:
    half a millisecond a step.
    """
    value = derive_seed(seed, "dropout", step, micro)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(value)
