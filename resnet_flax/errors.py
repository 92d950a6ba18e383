"""The exceptions that reach the user as one line instead of a traceback."""


class InputError(ValueError):
    """Bad input, or an environment that the user can mend.

    The message is one line that says what was wrong, where, and how to mend it; programs print it
    and exit with code 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on, though the input was good; programs print it and exit with code 1."""
