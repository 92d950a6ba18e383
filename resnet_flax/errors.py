"""The exceptions that reach the user as one line instead of a traceback."""


class InputError(ValueError):
    """Bad input, or an environment that the user can mend.

    The message is one line that says what was wrong, where, and how to mend it; programs print it
    and exit with code 2.
    """


class TrainingError(RuntimeError):
    """Training that has begun cannot go on; programs print the message and exit with code 1."""


def one_line(error: Exception) -> str:
    """Returns the error's message without line breaks, or its type's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def reason(error: Exception, most: int = 200) -> str:
    """Why an operation failed, in at most so many letters: the system's words if there are any."""
    return (getattr(error, "strerror", None) or one_line(error))[:most]
