"""Orders that need no memory: a keyed permutation of any length, computed at any place, so that resuming is arithmetic."""

import hashlib

import numpy as np

ROUNDS = 6


def key_of(*parts: object) -> int:
    """64 bits that follow from the parts: a seed for each thing that is shuffled."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def permuted(places_S: np.ndarray, length: int, key: int) -> np.ndarray:
    """Where the keyed permutation of 0 .. length-1 sends each place.

    A Feistel network over the next power of four, walked until it lands inside: no table, so the 10^9th place costs what the first does.
    """
    if length < 1:
        raise ValueError(f"a permutation of {length} places was asked for; it needs at least one.")
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(key_of(key, number)) for number in range(ROUNDS)]
    result_S = places_S.astype(np.uint64)
    pending = np.ones(result_S.shape, bool)
    while pending.any():
        left, right = result_S[pending] >> np.uint64(half), result_S[pending] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        result_S[pending] = (left << np.uint64(half)) | right
        pending = result_S >= np.uint64(length)
    return result_S.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's last steps: every bit of the result depends on every bit of the value."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
