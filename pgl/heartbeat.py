"""Who of the processes is still there: a sign of life of each, seen by all."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

LONGEST_INTERVAL_SECONDS = 0.5
BEATS_MISSED = 4
EXIT_STATUS = 3


@dataclass(frozen=True)
class Beat:
    """What a rank says about itself."""

    count: int = 0
    step: int = 0
    """Optimizer steps done."""
    failed: str = ""
    """The error that ends this rank."""
    finished: bool = False


class Heartbeats:
    """A thread that shows this rank's sign of life and watches those of the others.

    Signs go through a TCP store of rank 0, beside all collectives, so that a rank is named even
    where the others hang in NCCL. If one has been silent for too long, or has failed and this
    process does not notice by itself, the thread says so and ends the process.

    Args:
        host: Where rank 0 is.
        port: Its store's port; None on rank 0, which opens one.
        rank: This process.
        world_size: How many there are.
        timeout_seconds: Silence after which a rank counts as dead.
        end: Ends the process with a message.
    """

    def __init__(
        self,
        host: str,
        port: int | None,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout_seconds = timeout_seconds
        self.interval_seconds = min(LONGEST_INTERVAL_SECONDS, timeout_seconds / 5)
        self.beats: dict[int, Beat] = {}
        self.step = 0
        self._end = end or _end_process
        self._heard: dict[int, float] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._store: dist.TCPStore | None = dist.TCPStore(
            host,
            port or 0,
            is_master=port is None,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(timeout_seconds, 1.0)),
        )
        self.port = self._store.port
        self._show(Beat())

    def start(self) -> None:
        """Start to watch; every rank has been constructed by now."""
        now = time.monotonic()
        self._heard = {rank: now for rank in range(self.world_size) if rank != self.rank}
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye: nobody waits for this rank any more."""
        self._stopped.set()
        self._thread.join()
        self._try_to_show(Beat(step=self.step, finished=True))

    def fail(self, reason: str) -> None:
        """Tell the others what ends this rank, and stop."""
        self._stopped.set()
        self._thread.join()
        self._try_to_show(Beat(step=self.step, failed=reason or "an error"))

    def explain(self) -> str | None:
        """Say which rank is to blame for a collective that failed here; None if all are alive.

        Waits for a few beats, as a rank that has just died was heard from just now.
        """
        deadline = time.monotonic() + (BEATS_MISSED + 1) * self.interval_seconds
        while time.monotonic() < deadline:
            if self._lost(BEATS_MISSED * self.interval_seconds):
                break
            time.sleep(self.interval_seconds / 2)
        return self._lost(BEATS_MISSED * self.interval_seconds)

    def steps(self) -> str:
        """Return how far each rank was when it was last heard from."""
        reached = {rank: beat.step for rank, beat in self.beats.items()} | {self.rank: self.step}
        return ", ".join(f"rank {rank}: step {step:,}" for rank, step in sorted(reached.items()))

    def _run(self) -> None:
        count, failed_at = 0, None
        while not self._stopped.wait(self.interval_seconds):
            count += 1
            self._exchange(Beat(count, self.step))
            if any(beat.failed for beat in list(self.beats.values())):
                failed_at = failed_at or time.monotonic()
            # The main thread learns of a failure by its own collective, unless that is NCCL's.
            grace = 2 * BEATS_MISSED * self.interval_seconds
            overdue = failed_at is not None and time.monotonic() - failed_at > grace
            lost = self._lost(0.0 if overdue else self.timeout_seconds, failures=overdue)
            if lost and not self._stopped.is_set():
                self._end(f"rank {self.rank} ends: {lost}")
                return

    def _exchange(self, own: Beat) -> None:
        if self._store is None:
            return
        others = list(self._heard)
        try:
            self._show(own)
            values = self._store.multi_get([_key(rank) for rank in others])
        except (RuntimeError, OSError):
            # The store is rank 0's, whose silence is noticed like any other's; asked again, it
            # would print a page each time.
            self._store = None
            return
        for rank, value in zip(others, values, strict=True):
            beat = Beat(**json.loads(value))
            if beat != self.beats.get(rank) or beat.finished or beat.failed:
                self._heard[rank] = time.monotonic()
            self.beats[rank] = beat

    def _lost(self, seconds: float, failures: bool = True) -> str | None:
        failed = [(r, b.failed) for r, b in sorted(self.beats.items()) if b.failed and failures]
        if failed:
            return "; ".join(f"rank {rank} failed with {reason}" for rank, reason in failed)
        now = time.monotonic()
        silent = [rank for rank, heard in sorted(self._heard.items()) if now - heard > seconds]
        if seconds == 0 or not silent:
            return None
        if 0 in silent:
            silent = [0]  # without its store nobody is heard
        names = " and ".join(f"rank {rank}" for rank in silent)
        longest = max(now - self._heard[rank] for rank in silent)
        return (
            f"{names} died or lost its connection: no sign of life for {longest:.1f} s "
            f"({self.steps()})"
        )

    def _try_to_show(self, beat: Beat) -> None:
        with suppress(RuntimeError, OSError):  # nobody may be left to see it
            self._show(beat)

    def _show(self, beat: Beat) -> None:
        if self._store is not None:
            self._store.set(_key(self.rank), json.dumps(asdict(beat)))


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _end_process(message: str) -> None:
    """End the process although its main thread hangs in a collective."""
    sys.stderr.write(f"pgl: error: {message}\n")
    sys.stderr.flush()
    os._exit(EXIT_STATUS)
