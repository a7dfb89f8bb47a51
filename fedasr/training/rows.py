"""The users' local parameters that lie beside a checkpoint."""

from pathlib import Path
from typing import Any

from fedasr.data.corpus import Corpus, find_users
from fedasr.data.records import open_corpus
from fedasr.errors import UserError
from fedasr.federated.local import (
    REMEDY,
    ROWS_FILE,
    SLOTS_FILE,
    LocalStore,
    Rows,
)
from fedasr.training.builders import corpora, models
from fedasr.training.checkpoint import read_metadata as checkpoint_metadata
from fedasr.training.workdir import recorded_config

LOCAL_FOLDER = "local"  # of a work directory, the users' local parameters


def local_rows(
    path: str | Path, params: Any, corpus: Corpus, directory: str | Path
) -> tuple[Rows | None, Any]:
    """The local parameters of a corpus's users, as they were at a checkpoint.

    Args:
      path: of the checkpoint, as for `fedasr.training.checkpoint.restore_params`.
      params: its parameters.
      corpus: whose users.
      directory: of the corpus.

    Returns:
      What `Evaluator` takes: their layout, and from users to rows. (None, None) if the run had
      none, if they do not lie beside the checkpoint, or if it was trained on other data, whose
      users may have the same names.

    Raises:
      UserError: rows that are not those of the checkpoint.
    """
    metadata, step = checkpoint_metadata(path), path
    path = Path(path).absolute()
    config = recorded_config(metadata["config"])
    folders = [folder / LOCAL_FOLDER for folder in (path, path.parent, path.parent.parent)]
    folder = next((folder for folder in folders if (folder / SLOTS_FILE).is_file()), None)
    if (
        folder is None
        or metadata["stage"] != "main"
        or (layout := models.local_layout(config)) is None
        or not layout.personal
    ):
        return None, None
    if corpora.content_hash(Path(directory)) != config.data.identity:
        return None, None
    trained = open_corpus(corpora.data_directory(config), config.data.train)
    prototype = config.local.prototype
    store = LocalStore(folder, layout, len(trained.users), prototype, read_only=True)
    store.restore(metadata["units"])
    check_rows(store, step)
    return layout, store.rows_of(find_users(trained, corpus), params)


def described(store: LocalStore) -> dict[str, Any]:
    """What a checkpoint keeps to know its rows by, when it is read: see `check_rows`."""
    return {"local_users": int(store.known.sum()), "local_rows": store.digest()}


def check_rows(store: LocalStore, path: str | Path) -> None:
    """Raises UserError unless the rows in the store are those that a checkpoint was saved with.

    Reads all of them, as they are after the round that the store was restored to.
    """
    metadata, found = checkpoint_metadata(path), described(store)
    if (users := found["local_users"]) != (expected := metadata["local_users"]):
        raise UserError(
            f"{store.folder} has the local parameters of {users} users, the checkpoint {path} "
            f"was saved with those of {expected}: they belong together: {REMEDY}"
        )
    if found["local_rows"] != metadata.get("local_rows", found["local_rows"]):  # older: none
        raise UserError(
            f"{store.folder / ROWS_FILE} or {SLOTS_FILE} there is damaged, or of another run: it "
            f"has other local parameters than the checkpoint {path} was saved with: {REMEDY}"
        )
