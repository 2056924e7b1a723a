"""A model that fits its limit by construction: search for the finest steps whose file does.

What is minimised is the factor of all steps, subject to the length of the file; the error of the
weights, and of the outputs, goes with it. One number is enough with balanced steps: there a bit
saved in any row costs the same loss, which is the condition for the least loss at a given size
(Lagrange), and multiplying all steps by one factor keeps it. On the grid's own steps the condition
does not hold, and the search finds no more than the finest common factor. The loss itself is not
evaluated. The entropy of the codes tells how the size changes from one factor to the next; only the
length of a file that was really packed counts. Neither need be monotonous in the factor to the last
byte, so the result is the finest of the files that were packed and fit, not a proven optimum.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from pgl.artifact.errors import ArtifactTooLarge
from pgl.quant.stored import StoredTensor

Stored = Mapping[str, StoredTensor]

MAX_PACKS = 6
MAX_GUESSES = 6  # quantisations between two packs
SPARE_SHARE = 1 / 4000  # of the limit, which the search leaves unused rather than pack again
MIN_SPARE_BYTES = 64
MIN_SLOPE_OCTAVES = 0.02  # over less the rounding of steps to float16 hides the slope
MAX_LEAP_OCTAVES = 3.0  # of a guess with one side only: near 8 bits a code the slope vanishes
MAX_OCTAVES = 12.0  # beyond them few codes are not zero, if any


@dataclass(frozen=True)
class Attempt:
    """A file that was packed on the way."""

    step_factor: float
    total_bytes: int


@dataclass(frozen=True)
class Fit:
    """The result of a search."""

    stored: Stored
    attempts: list[Attempt]
    """All files that were packed, in order."""
    chosen: int
    """Which of them `stored` is."""

    @property
    def step_factor(self) -> float:
        """What the steps were multiplied by."""
        return self.attempts[self.chosen].step_factor


def code_bytes(stored: Stored) -> float:
    """Return the entropy of all integer codes, each matrix by itself, in bytes."""
    bits = 0.0
    for tensor in stored.values():
        if tensor.scale_R is not None and tensor.data.numel():
            count_S = torch.bincount(tensor.data.flatten().int() + 128, minlength=256).double()
            share_S = count_S / count_S.sum()
            bits -= float((torch.xlogy(count_S, share_S)).sum()) / math.log(2)
    return bits / 8


def fit_to_limit(
    quantise: Callable[[float], Stored],
    pack: Callable[[Stored], int],
    limit_bytes: int | None,
    refine: bool,
) -> Fit:
    """Find the least factor of all steps whose packed file is within the limit.

    With `refine` the search ends when a file leaves at most 1/4000 of the limit unused (64 bytes if
    that is more), and after six files in any case. If even the coarsest steps do not fit, the last
    file has all codes zero.

    Args:
        quantise: Makes the stored tensors with all steps multiplied by a factor.
        pack: Packs them and returns the length of the file in bytes.
        limit_bytes: What the file may be; None takes the plan as it is.
        refine: Whether to make steps finer too where the plan leaves bytes unused. False only makes
            them coarser, and only if the plan does not fit.

    Raises:
        ArtifactTooLarge: The file does not fit even with every code zero.
    """
    search = _Search(quantise, pack, limit_bytes)
    search.attempt(1.0, quantise(1.0))
    if limit_bytes is None or (search.best is not None and not refine):
        return search.result()
    spare_bytes = max(math.ceil(limit_bytes * SPARE_SHARE), MIN_SPARE_BYTES)
    while len(search.attempts) < MAX_PACKS:
        # Half of what may be left over is the aim: half above it is still under the limit.
        wanted_bytes = search.entropy_of(limit_bytes - spare_bytes / 2)
        factor, stored = search.solve(wanted_bytes, spare_bytes / 4)
        if factor in [attempt.step_factor for attempt in search.attempts]:
            break  # all codes are zero already, or as fine as they can be
        search.attempt(factor, stored)
        if 0 <= limit_bytes - search.attempts[-1].total_bytes <= spare_bytes:
            break
    while search.best is None:
        last = search.attempts[-1]
        if last.step_factor >= 2**MAX_OCTAVES:
            search.attempt(last.step_factor, _zeroed(search.stored))
            last = search.attempts[-1]
            if search.best is not None:
                break
            raise ArtifactTooLarge(
                f"the artifact is {last.total_bytes:,} bytes with every code zero, "
                f"{last.total_bytes - limit_bytes:,} more than the limit of {limit_bytes:,}: make "
                "the model smaller, or store less of it in floating point"
            )
        factor = min(2 * last.step_factor, 2**MAX_OCTAVES)
        search.attempt(factor, quantise(factor))
    return search.result()


def _zeroed(stored: Stored) -> Stored:
    """Return tensors with every code zero."""
    return {
        name: tensor
        if tensor.scale_R is None
        else replace(tensor, data=torch.zeros_like(tensor.data))
        for name, tensor in stored.items()
    }


class _Search:
    """What a search has tried."""

    def __init__(
        self,
        quantise: Callable[[float], Stored],
        pack: Callable[[Stored], int],
        limit_bytes: int | None,
    ) -> None:
        self.quantise, self.pack, self.limit_bytes = quantise, pack, limit_bytes
        self.attempts: list[Attempt] = []
        self.entropies: list[float] = []
        self.stored: Stored = {}
        self.best: tuple[int, Stored] | None = None

    def attempt(self, factor: float, stored: Stored) -> None:
        """Pack a model; it is the best so far if it fits on finer steps than those before."""
        self.stored = stored
        self.attempts.append(Attempt(factor, self.pack(stored)))
        self.entropies.append(code_bytes(stored))
        fits = self.limit_bytes is None or self.attempts[-1].total_bytes <= self.limit_bytes
        if fits and (self.best is None or factor < self.attempts[self.best[0]].step_factor):
            self.best = (len(self.attempts) - 1, stored)

    def entropy_of(self, total_bytes: float) -> float:
        """Return the entropy whose file has a length, from the files that were packed so far."""
        last, entropy = self.attempts[-1].total_bytes, self.entropies[-1]
        packed_share = 1.0  # bytes of file for a byte of entropy: codecs know more than one matrix
        if len(self.attempts) > 1 and abs(entropy - self.entropies[-2]) > entropy / 200:
            share = (last - self.attempts[-2].total_bytes) / (entropy - self.entropies[-2])
            packed_share = min(max(share, 0.7), 1.5)
        return entropy + (total_bytes - last) / packed_share

    def result(self) -> Fit:
        """Return the best."""
        assert self.best is not None
        return Fit(self.best[1], self.attempts, self.best[0])

    def solve(self, wanted_bytes: float, tolerance_bytes: float) -> tuple[float, Stored]:
        """Return a factor whose codes have about the wanted entropy, and the model it makes."""
        stored, octaves = self.stored, math.log2(self.attempts[-1].step_factor)
        found_bytes = code_bytes(stored)
        num_codes = sum(t.data.numel() for t in stored.values() if t.scale_R is not None)
        slope = -num_codes / 8  # of a fine grid: one bit for each code and octave
        known = [
            (math.log2(attempt.step_factor), entropy)
            for attempt, entropy in zip(self.attempts, self.entropies, strict=True)
        ]
        sides: list[bool] = []
        for _ in range(MAX_GUESSES):
            if abs(found_bytes - wanted_bytes) <= tolerance_bytes or not num_codes:
                break
            sides.append(found_bytes > wanted_bytes)
            fine = max((k for k in known if k[1] > wanted_bytes), default=None)
            coarse = min((k for k in known if k[1] <= wanted_bytes), default=None)
            if fine is None or coarse is None or fine[0] >= coarse[0]:
                leap = (max(wanted_bytes, 0) - found_bytes) / slope
                guess = octaves + max(min(leap, MAX_LEAP_OCTAVES), -MAX_LEAP_OCTAVES)
            else:
                # Near 8 bits a code, and where float16 rounds the steps of many rows at once, a
                # straight line through both sides hardly comes nearer: at least a sixth does.
                share = (fine[1] - wanted_bytes) / (fine[1] - coarse[1])
                halves = len(sides) > 1 and sides[-1] == sides[-2]
                share = 0.5 if halves else max(min(share, 5 / 6), 1 / 6)
                guess = fine[0] + share * (coarse[0] - fine[0])
            guess = max(min(guess, MAX_OCTAVES), -MAX_OCTAVES)
            if guess == octaves:
                break
            stored = self.quantise(2**guess)
            guess_bytes = code_bytes(stored)
            if abs(guess - octaves) >= MIN_SLOPE_OCTAVES:
                slope = min((guess_bytes - found_bytes) / (guess - octaves), -num_codes / 800)
            octaves, found_bytes = guess, guess_bytes
            known.append((octaves, found_bytes))
        return 2**octaves, stored
