"""The one exception that stands for a user's mistake, and what tells that the system gave out."""

import errno
import re

_BY_NUMBER = {
    errno.ENOMEM: "memory",
    errno.EMFILE: "open files",
    errno.ENFILE: "open files",
}
# What Python, C++ and the libraries say of it, in the order in which it is looked for. That a
# resource is "temporarily unavailable" is what the C library says of threads.
_BY_WORDS = (
    (
        "threads",
        "start new thread|[Tt]hread creation failed|thread constructor failed"
        "|Resource temporarily unavailable",
    ),
    ("open files", "Too many open files"),
    (
        "memory",
        "bad_alloc|[Cc]annot allocate memory|[Oo]ut of memory|OOM when|failed to map segment"
        "|[Uu]nable to allocate|[Ff]ailed to allocate",
    ),
)
REMEDIES = {
    "memory": "give the process more memory, or take smaller batches",
    "threads": "allow the process more threads or more memory (ulimit -u, ulimit -v, the "
    "container's limits)",
    "open files": "allow the process more open files (ulimit -n)",
}


class UserError(ValueError):
    """A mistake that the user can mend: the message is one line that says what to change.

    Command-line programs print the message without a traceback and exit with status 2. Code that
    turns a `ValueError` of other code into something else lets this one pass first.
    """


class Exhausted(MemoryError):
    """The system gave out (see `exhausted`) where something else would have been thought of it."""


def exhausted(error: BaseException | None) -> str:
    """What an error, or what it came from, says that the system has no more of.

    Returns:
      "memory", "threads", "open files", or "" for none of these.
    """
    while error is not None:
        if found := _of_one(error):
            return found
        error = error.__cause__ or error.__context__
    return ""


def _of_one(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return _BY_NUMBER.get(error.errno, "")
    for what, words in _BY_WORDS:
        if re.search(words, text):
            return what
    # Of JAX and TensorStore; the latter says it of a full disk, too.
    full = "No space" in text or "quota" in text
    if isinstance(error, MemoryError) or ("RESOURCE_EXHAUSTED" in text and not full):
        return "memory"
    return ""


def pass_exhaustion(error: BaseException, doing: str) -> None:
    """Raises Exhausted if the system gave out: then what was being done may be as good as ever.

    Args:
      error: that was caught.
      doing: "reading x", for the message.
    """
    if exhausted(error):
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise Exhausted(f"{doing}: {text}") from error
