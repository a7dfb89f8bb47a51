"""What an error says that the system has no more of."""

import errno
import os

import pytest

from fedasr.errors import Exhausted, UserError, exhausted, pass_exhaustion


def os_error(number):
    return OSError(number, os.strerror(number), "file")


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "memory"),
        (MemoryError("std::bad_alloc"), "memory"),
        (RuntimeError("std::bad_alloc"), "memory"),
        (os_error(errno.ENOMEM), "memory"),
        (ImportError("libx.so: failed to map segment from shared object"), "memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes"), "memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: No space left on device"), ""),
        (RuntimeError("RESOURCE_EXHAUSTED: Disk quota exceeded"), ""),
        (RuntimeError("can't start new thread"), "threads"),
        (RuntimeError("Resource temporarily unavailable"), "threads"),
        (os_error(errno.EMFILE), "open files"),
        (os_error(errno.ENFILE), "open files"),
        (ValueError("INTERNAL: x: Too many open files [OS error 24: EMFILE]"), "open files"),
        (os_error(errno.EAGAIN), ""),  # of a lock that another process has
        (os_error(errno.ENOSPC), ""),
        (ValueError("no such thing"), ""),
        (None, ""),
    ],
)
def test_what_gave_out(error, what):
    assert exhausted(error) == what
    if error is None:
        return
    for how in ("from", "while"):
        try:
            try:
                raise error
            except type(error) as caught:
                if how == "from":
                    raise KeyError("other") from caught
                raise KeyError("other")  # noqa: B904
        except KeyError as other:
            assert exhausted(other) == what
    if not what:
        pass_exhaustion(error, "reading x")
        return
    with pytest.raises(Exhausted, match="reading x: ") as caught:
        pass_exhaustion(error, "reading x")
    assert exhausted(caught.value) and not isinstance(caught.value, UserError | OSError)
