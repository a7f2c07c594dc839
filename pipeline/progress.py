"""Progress of long work: a bar with rate and remaining time on a terminal, a line now and then in a log."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

LOG_SECONDS = 15.0


class Progress:
    """Counts work done; use as a context manager.

    ::

        with Progress("shard", total=5000, unit="examples") as progress:
            progress.advance(1000)

    Args:
        total: how much there is in all; 0 if nobody knows.
        done: how much was there before this run; it counts for the bar but not for the rate.
        stream: where to write, stderr by default.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        label: str,
        total: int = 0,
        unit: str = "examples",
        done: int = 0,
        stream=None,
        log_seconds: float = LOG_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.label, self.total, self.unit = label, total, unit
        self.first = self.count = done
        self._stream = stream or sys.stderr
        self._log_seconds, self._clock = log_seconds, clock
        self._start = self._logged = clock()
        self._told = done
        self._note = ""
        self._lock = threading.Lock()
        self._bar = self._task = None

    def __enter__(self) -> "Progress":
        if self._stream.isatty():
            self._open_bar()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and self._told != self.count and self._clock() - self._start >= self._log_seconds:
            self._log()

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Adds finished work; `note` (for example a loss) is shown behind it. Any thread may call this."""
        with self._lock:
            self.count += amount
            self._note = self._note if note is None else note
            if self._bar:
                self._bar.update(self._task, completed=self.count, note=self._note, rate=self.rate)
            elif self._clock() - self._logged >= self._log_seconds:
                self._logged = self._clock()
                self._log()

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.count - self.first) / max(self._clock() - self._start, 1e-9)

    def _log(self) -> None:
        self._told = self.count
        share = f"/{self.total} ({100 * self.count // self.total}%)" if self.total else ""
        line = f"{self.label}: {self.count}{share} {self.unit}, {self.rate:.1f}/s"
        if self.total > self.count and self.rate > 0:
            line += f", {_duration((self.total - self.count) / self.rate)} left"
        print(f"{line}{', ' if self._note else ''}{self._note}", file=self._stream, flush=True)

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}  {task.fields[rate]:.1f}/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(file=self._stream),
        )
        self._task = self._bar.add_task(
            self.label, total=self.total or None, completed=self.count, unit=self.unit, rate=0.0, note=""
        )
        self._bar.start()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
