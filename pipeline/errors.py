"""Errors that belong to the user, not to the program."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class UserError(ValueError):
    """A mistake in what the user gave: a path, a name, a setting, a file's content.

    The message is one line that says what is wrong, where, and what to do. Every stage prints it as
    ``error: <message>`` without a traceback and exits with code 2.
    """


@contextlib.contextmanager
def room_in(folder: Path | str) -> Iterator[None]:
    """Turns the error of a full disk, which libraries raise with and without a file name, into a clear one.

    Raises:
        UserError: no space was left for what was written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"{folder}: no space is left ({error.strerror}): make room, then run again to go on from here"
        ) from error
