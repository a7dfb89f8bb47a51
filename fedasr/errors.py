"""The one exception that stands for a user's mistake, and what tells that memory ran out."""

import errno


class UserError(ValueError):
    """A mistake that the user can mend: the message is one line that says what to change.

    Command-line programs print the message without a traceback and exit with status 2. Code that
    turns a `ValueError` of other code into something else lets this one pass first.
    """


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that the system has no memory left."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or "can't start new thread" in text:
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        # Of JAX and TensorStore; the latter says it of a full disk, too.
        if "RESOURCE_EXHAUSTED" in text and "No space" not in text and "quota" not in text:
            return True
        error = error.__cause__ or error.__context__
    return False
