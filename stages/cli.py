"""What every command shares: settings from the command line in, one clear line and an exit code out."""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module

from pipeline.errors import UserError

USER_ERROR = 2
INTERRUPTED = 130
ALONE_SECONDS = 10  # longer than the end of a process takes
# Failures of the disk that only the user can mend; any other failed call is a fault of the program and shows where.
DISK = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS
}  # fmt: skip
CHILD = "LAVENDER_CHILD"  # set in the environment of a stage that the driver started


def guarded(body: Callable[[], int | None]) -> int:
    """Runs `body`; a user's mistake, or a full or closed disk, becomes `error: ...` on stderr and exit code 2."""
    try:
        return body() or 0
    except UserError as error:
        _leave_it_to_the_first()
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if error.errno not in DISK or error.filename is None:
            raise
        print(f"error: cannot read or write {error.filename}: {error.strerror}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on from here", file=sys.stderr)
        return INTERRUPTED


def _leave_it_to_the_first() -> None:
    """Of several processes with the same mistake the first one tells it; torchrun then ends the others. One that made
    it alone tells it after that time."""
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(ALONE_SECONDS)


def stage(module: str, function: str, doc: str | None, argv: Sequence[str] | None = None) -> int:
    """Composes the settings from `argv` (Hydra overrides) and calls `module.function(cfg)`.

    The module is imported only after the settings are known to be good, so a typing mistake is answered at once.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if CHILD in os.environ:
        follow_parent()
    if {"-h", "--help"} & set(argv):
        print(usage(doc))
        return 0

    if not sys.stderr.isatty():  # in a log, the libraries' own bars are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def body() -> None:
        from pipeline.config import compose

        cfg = compose(argv)
        getattr(import_module(module), function)(cfg)

    return guarded(body)


def lowered(argv: Sequence[str]) -> list[str]:
    """The words of a command with the names that make takes (``DATA=``, ``MODEL=``, ...) written as settings."""
    names = ("DATA", "TEACHER", "MODEL", "ARM", "SEED")
    parts = (word.partition("=") for word in argv)
    return [(name.lower() if name in names else name) + sign + value for name, sign, value in parts]


def follow_parent() -> None:
    """Ends this process when its parent is gone.

    A parent that is killed outright cannot tell its children; an orphan would hold the folders that the next run of
    the same command needs.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def usage(doc: str | None) -> str:
    """The stage's contract and the choices of every group."""
    from pipeline.config import GROUPS, choices

    lines = [doc or "", "Settings are Hydra overrides: data=world train.steps=100 seed=2 ...", ""]
    lines += [f"  {group}={'|'.join(choices(group))}" for group in GROUPS]
    return "\n".join(lines)
