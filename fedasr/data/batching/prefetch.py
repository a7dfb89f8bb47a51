"""Reads ahead in a thread."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Prefetcher:
    """Runs an iterator in a background thread, a few items ahead; use it as a context manager.

    Args:
      items: its `__next__` runs in the thread; an exception there is raised here, in its place.
      depth: how many finished items may wait.
      transfer: applied to each item in the thread, such as `jax.device_put`.
    """

    _END = object()

    def __init__(
        self,
        items: Iterable[Any],
        depth: int = 2,
        transfer: Callable[[Any], Any] = lambda item: item,
    ) -> None:
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items, transfer), daemon=True)
        self._thread.start()

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _work(self, items: Iterable[Any], transfer: Callable[[Any], Any]) -> None:
        try:
            for item in items:
                self._put((transfer(item), None))
                if self._stop.is_set():
                    return
            self._put((self._END, None))
        except BaseException as error:
            self._put((None, error))

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Any]:
        while True:
            item, error = self._queue.get()
            if error is not None:
                raise error
            if item is self._END:
                return
            yield item
