"""COCO's compressed run-length codes, many at a time: their run lengths, and whether a code fills its image.

A number is written in characters of 5 bits, low bits first, from "0" on; bit 6 says that more follow, the highest bit
of the last one is the sign. From the fourth number on, the difference to the one two places before is written. The
runs are zeros first, column by column. pycocotools does not check codes: one that is cut or does not fill its image
makes it read beyond its memory, or never end.

Legend: N codes, B bytes of all codes, R runs of all codes.
"""

import numpy as np

_LONGEST = 8  # characters of a number: 40 bits, more than any image has pixels
_PIECE = 1 << 17  # bytes that are decoded at a time: they stay in the cache


def decode_codes(counts: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run lengths (R,) int32 or int64, where each code's begin (N+1,), and which codes are sound (N,) bool.

    counts: (B,) uint8; bounds: (N+1,) int64 into counts. Runs of a code that is not sound mean nothing.
    """
    digits = counts - np.uint8(48)  # a character below "0" becomes a large number
    wrong, more = digits > 63, digits > 31
    sound = bounds[1:] > bounds[:-1]
    ends = bounds[1:][sound] - 1
    wrong[ends] |= more[ends]  # a code stops inside a number
    more[ends] = False
    digits &= 31
    # Numbers from their last characters, which have the signs ...
    last = digits.take(np.flatnonzero(~more))
    numbers = ((last ^ 16) - np.uint8(16)).view(np.int8).astype(np.int32)
    # ... to the first: of each number the last character that is left, as long as there is one.
    rest = np.flatnonzero(more)
    first = bounds - np.searchsorted(rest, bounds)
    owner = rest - np.arange(len(rest))
    length = 1
    while len(rest) and length <= _LONGEST:
        length += 1
        if length == 7:  # over 30 bits
            numbers = numbers.astype(np.int64)
        final = np.append(owner[1:] != owner[:-1], True)
        own = owner[final]
        numbers[own] = numbers[own] << 5 | digits[rest[final]]
        rest, owner = rest[~final], owner[~final]
        if length > _LONGEST:
            sound[np.searchsorted(first, own, side="right") - 1] = False
    # Runs: sums over every second number, which begin anew with each code and leave out its first number. A run that
    # is too long for the type becomes negative.
    runs = np.empty_like(numbers)
    begin = first[:-1][bounds[1:] > bounds[:-1]]
    for parity in (0, 1):
        sums = np.append(numbers.dtype.type(0), np.cumsum(numbers[parity::2], dtype=numbers.dtype))
        before = np.repeat(sums[(begin - parity) // 2 + 1], np.diff((np.append(begin, len(runs)) + 1 - parity) // 2))
        np.subtract(sums[1:], before, out=runs[parity::2])
    runs[begin] = numbers[begin]
    if runs.min(initial=0) < 0:
        sound[np.searchsorted(first, np.flatnonzero(runs < 0), side="right") - 1] = False
    sound[np.searchsorted(bounds, np.flatnonzero(wrong), side="right") - 1] = False
    return runs, first, sound


def decode_runs(counts: bytes) -> np.ndarray:
    """Run lengths (int64) of one code; ValueError where it is broken."""
    runs, _, sound = decode_codes(np.frombuffer(counts, np.uint8), np.array([0, len(counts)]))
    if not sound[0]:
        raise ValueError("not a compressed run-length code")
    return runs.astype(np.int64)


def measure_codes(counts: np.ndarray, bounds: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bool: the code is sound and its runs add up to height x width; (N,) int64: its area in px^2.

    sizes: (N, 2). The area is the sum of every second run, from a code's second one on.
    """
    pixels = sizes[:, 0].astype(np.int64) * sizes[:, 1]
    filled, areas = np.zeros(len(pixels), dtype=bool), np.zeros(len(pixels), dtype=np.int64)
    begin = 0
    while begin < len(pixels):
        end = max(begin + 1, int(np.searchsorted(bounds, bounds[begin] + _PIECE, side="right")) - 1)
        runs, first, sound = decode_codes(counts[bounds[begin] : bounds[end]], bounds[begin : end + 1] - bounds[begin])
        even, odd = (
            np.diff(np.append(0, np.cumsum(runs[parity::2], dtype=np.int64))[(first + 1 - parity) // 2])
            for parity in (0, 1)
        )
        filled[begin:end] = sound & (even + odd == pixels[begin:end])
        areas[begin:end] = np.where(first[:-1] % 2, even, odd)
        begin = end
    return filled, areas
