"""Synthetic speech as a corpus on disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fedasr.data.preparation.folder import cache_dir
from fedasr.data.preparation.prepare import prepare
from fedasr.data.preparation.progress import progress_bar
from fedasr.data.synthetic import speech
from fedasr.data.synthetic.config import SyntheticConfig
from fedasr.data.utterances import Progress


def prepare_synthetic(
    config: SyntheticConfig,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    store: str = "features",
) -> Path:
    """Makes the synthetic corpus of `config` unless it is already there.

    Args:
      config: of `fedasr.data.synthetic`.
      out: folder to write; a folder of the cache, named by the configuration, if None.
      progress: called with (utterances done, all); a progress bar on stderr if None.
      overwrite: as in `prepare`.
      store: as in `prepare`.

    Returns:
      The folder of the corpus.

    Raises:
      UserError: the speech synthesiser is missing, or as `prepare`.
    """
    fingerprint = speech.fingerprint(config)
    cached = out is None  # what the cache holds may come from an older version
    if out is None:
        kind = "" if store == "features" else f"-{store}"
        out = cache_dir() / f"synthetic-{config.task}-{fingerprint[:16]}{kind}"
    with progress_bar("preparing speech") if progress is None else _as_is(progress) as report:
        prepare(
            speech.synthetic_utterances(config),
            out,
            name=f"synthetic {config.task}",
            fingerprint=fingerprint,
            total=speech.total_utterances(config),
            progress=report,
            overwrite=overwrite or cached,
            store=store,
        )
    return Path(out)


@contextlib.contextmanager
def _as_is(progress: Progress) -> Iterator[Progress]:
    yield progress
