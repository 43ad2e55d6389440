"""COCO's compressed run-length codes, many at a time: their run lengths, and whether a code fills its image.

A number is written in characters of 5 bits, low bits first, from "0" on; bit 6 says that more follow, the highest bit
of the last one is the sign. From the fourth number on, the difference to the one two places before is written. The
runs are zeros first, column by column. pycocotools does not check codes: one that is cut or does not fill its image
makes it read beyond its memory, or never end.

Legend: N codes, B bytes of all codes, R runs of all codes.
"""

import numpy as np

_LONGEST = 8  # characters of a number: 40 bits, more than any image has pixels
_PIECE = 1 << 15  # bytes that are decoded at a time: they stay in the cache


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
    # Numbers, from the last character, which has the sign, to the first.
    last = np.flatnonzero(~more)
    length = np.diff(last, prepend=-1)
    digits &= 31
    short = length.max(initial=0) <= 6  # 30 bits
    numbers = digits[last].astype(np.int32 if short else np.int64)
    numbers -= (numbers & 16) << 1
    for place in range(1, _LONGEST):
        rest = np.flatnonzero(length > place)
        if not len(rest):
            break
        numbers[rest] = numbers[rest] << 5 | digits[last[rest] - place]
    # Runs: sums over every second number, which begin anew with each code, and leave out its first one.
    first = np.searchsorted(last, bounds)
    sizes = np.diff(first)
    index = np.arange(len(numbers), dtype=np.int32) - np.repeat(first[:-1].astype(np.int32), sizes)
    runs = numbers.copy()
    odd = numbers * (index & 1).astype(numbers.dtype)
    even = numbers - odd
    even[first[:-1][sizes > 0]] = 0
    for part, chosen in ((odd, index & 1 == 1), (even, (index & 1 == 0) & (index > 0))):
        sums = np.cumsum(part, dtype=part.dtype)  # a run that is too long for the type becomes negative
        before = np.append(part.dtype.type(0), sums)[first[:-1]]
        np.copyto(runs, sums - np.repeat(before, sizes), where=chosen)
    bad = np.flatnonzero((runs < 0) | (length > _LONGEST))
    sound[np.searchsorted(first, bad, side="right") - 1] = False
    sound[np.searchsorted(bounds, np.flatnonzero(wrong), side="right") - 1] = False
    return runs, first, sound


def decode_runs(counts: bytes) -> np.ndarray:
    """Run lengths (int64) of one code; ValueError where it is broken."""
    runs, _, sound = decode_codes(np.frombuffer(counts, np.uint8), np.array([0, len(counts)]))
    if not sound[0]:
        raise ValueError("not a compressed run-length code")
    return runs.astype(np.int64)


def fill_images(counts: np.ndarray, bounds: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(N,) bool: the code is sound and its runs add up to height x width; sizes: (N, 2)."""
    pixels = sizes[:, 0].astype(np.int64) * sizes[:, 1]
    filled = np.zeros(len(pixels), dtype=bool)
    begin = 0
    while begin < len(pixels):
        end = max(begin + 1, int(np.searchsorted(bounds, bounds[begin] + _PIECE, side="right")) - 1)
        runs, first, sound = decode_codes(counts[bounds[begin] : bounds[end]], bounds[begin : end + 1] - bounds[begin])
        sums = np.append(0, np.cumsum(runs, dtype=np.int64))
        filled[begin:end] = sound & (np.diff(sums[first]) == pixels[begin:end])
        begin = end
    return filled
