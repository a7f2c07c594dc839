"""SIGTERM: what a cluster sends before it takes a machine away. The run saves at the end of its step and ends."""

from __future__ import annotations

import signal
import threading


class Preemption:
    """While active, SIGTERM does not end the process but is remembered in ``asked``.

    Further ones change nothing: SLURM and torchrun both send one. Outside the main thread no signal arrives, and
    nothing is changed.
    """

    def __init__(self):
        self.asked = False
        self._before = None
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Preemption:
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self.asked = True
