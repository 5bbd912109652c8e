"""Handwriting: the 8 x 8 scans of real digits that scikit-learn carries, sorted by label and split."""

from functools import cache

import numpy as np

from qvl.worlds.world import Split, belongs

LEVELS = 16
"""A scan's ink goes from 0 to this."""


@cache
def scans(split: Split) -> tuple[np.ndarray, ...]:
    """For each digit 0 to 9 its scans, (number, 8, 8) from 0 to 1. The checksum of its pixels decides a scan's split, so that equal
    scans are in one split."""
    pixels, labels = _all_scans()
    mine = np.array([belongs(scan.tobytes(), split) for scan in pixels])
    return tuple(pixels[mine & (labels == digit)].astype(np.float32) / LEVELS for digit in range(10))


@cache
def _all_scans() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "the digits world shows scans from scikit-learn, which is missing; install qvl[test]."
        ) from error
    flat, labels = load_digits(return_X_y=True)
    return np.asarray(flat, dtype=np.uint8).reshape(-1, 8, 8), np.asarray(labels)
