"""Random numbers by counting: the i-th number of a seed is a function of the two, and of nothing that ran before.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), whose i-th
output is a hash of seed + (i + 1) * GOLDEN; so there is no state to keep, and a row draws the same numbers in any
batch, and again after it was interrupted.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)


def mix64(x: int) -> int:
    """SplitMix64's hash of 64 bits."""
    x &= 2**64 - 1
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        x = (x ^ x >> shift) * multiplier & 2**64 - 1
    return x


def row_key(seed: int) -> int:
    """What `uniform` takes for a seed, as int64. Hashed, for the streams of keys that differ by GOLDEN overlap."""
    return _signed(mix64(seed))


def derive_seed(seed: int, sample: int) -> int:
    """The seed of the `sample`-th sample of a prompt, as int64; the first one's is the seed itself."""
    return _signed(seed if sample == 0 else mix64(mix64(seed) ^ sample))


def uniform(keys: Tensor, index: Tensor) -> Tensor:
    """For each key (int64) the index-th number (int64) of its stream: float64, in [0, 1), in steps of 2**-53."""
    x = keys + (index + 1) * _signed(GOLDEN)
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        x = (x ^ _shift_right(x, shift)) * _signed(multiplier)  # wraps around, as the hash wants
    return _shift_right(x, 11).to(torch.float64) * 2.0**-53


def _shift_right(x: Tensor, shift: int) -> Tensor:
    """Of int64 as if it were unsigned: zeros come in from the left."""
    return (x >> shift) & (2 ** (64 - shift) - 1)


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    return (x + 2**63) % 2**64 - 2**63
