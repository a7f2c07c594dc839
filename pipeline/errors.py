"""Errors that belong to the user, not to the program."""


class UserError(ValueError):
    """A mistake in what the user gave: a path, a name, a setting, a file's content.

    The message is one line that says what is wrong, where, and what to do. Every stage prints it as
    ``error: <message>`` without a traceback and exits with code 2.
    """
