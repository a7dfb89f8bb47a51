"""What a run would be: all of it is made and checked, nothing is trained."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from fedasr.data.records import open_corpus, read_metadata
from fedasr.federated.extras import MemoryLayout
from fedasr.federated.local import (
    LocalStore,
)
from fedasr.privacy.ledger import UNKNOWN_USERS, Users
from fedasr.text import CharTokenizer, learned_vocabulary, tokenizer_for
from fedasr.training import describe, ledgers, selection, starts
from fedasr.training.builders import (
    algorithms,
    clients,
    corpora,
    decoders,
    devices,
    mechanisms,
    models,
    pooled,
    simulations,
    whole,
)
from fedasr.training.builders.splits import check_splits
from fedasr.training.config import Config
from fedasr.training.logging import to_json
from fedasr.training.remote import copies
from fedasr.training.remote.storage import is_remote
from fedasr.training.sections import Data
from fedasr.training.workdir import (
    check_same,
    disk_errors,
    extended,
    local_path,
    read_existing,
    start_hash,
)


def dry_run(
    config: Mapping[str, Any] | Config,
    workdir: str | Path | None = None,
    extend: int | None = None,
    only_seed: bool = False,
) -> dict[str, Any]:
    """What a run would be: resolves the configuration, trains nothing, makes no data.

    Args:
      config, extend, only_seed: see `fedasr.training.loop.run`; of a seed the run after it is told.
      workdir: where it would be, to find out whether it may; None for anywhere.

    Returns:
      The keys of a summary that can be known beforehand, and `bytes_per_client` {"down", "up"}.

    Raises:
      UserError: as the run itself would.
    """
    copies.refresh()
    remote = workdir is not None and is_remote(workdir)
    if workdir is not None:
        workdir = local_path(copies.local(workdir))
    checked = whole.checked(config, workdir)
    if remote:
        whole.check_remote(checked, only_seed)
    if only_seed:
        whole.check_seed(checked)
    selection.check(checked)
    with disk_errors(workdir):
        checked = _rehearse_place(checked, workdir, extend)
    return _rehearsed(checked, workdir)


def _rehearsed(config: Config, workdir: str | Path | None) -> dict[str, Any]:
    """The summary of a checked configuration."""
    recogniser = models.build_recogniser(config)
    shapes = jax.eval_shape(recogniser.init, jax.random.key(0))
    count = models.parameter_count(recogniser)
    settings = config.data
    if settings.dir and settings.population and not Path(settings.dir).exists():
        population = settings.population
    elif settings.dir:
        population = _rehearse(config, Path(settings.dir))
        if vocabulary := learned_vocabulary(read_metadata(settings.dir)):
            config = config.with_data(vocabulary=vocabulary)
    else:
        population = _rehearse_synthetic(config)
    summary = {
        "status": "dry_run",
        "name": config.name,
        "algorithm": config.algorithm,
        "parameters": count,
        "population": population,
        "device": devices.device_name(jax.devices()),
        "config": config.tree(),
    }
    if config.has_rounds:
        summary |= _federated(config, shapes, population, workdir)
    return to_json(summary)


def _federated(
    config: Config, shapes: Any, population: int, workdir: str | Path | None
) -> dict[str, Any]:
    """What can be known of federated rounds: cost and privacy.

    Args:
      config, workdir: of the run.
      shapes: of the model's parameters.
      population: training users.
    """
    sampler = mechanisms.make_sampler(config, population)
    mechanism = mechanisms.make_mechanism(config, sampler, models.sent_parameters(config))
    mechanism.client_transform()
    layout = models.local_layout(config)
    if layout is not None:
        mechanism.check_local(config.local.prototype)
    described = clients.describe_client(config, shapes, local=layout.local if layout else None)
    described = algorithms.with_extras(config, described)
    earlier, known = ledgers.runs_before(config, workdir)
    names, rounds = _user_names(config.data), config.rounds
    users = Users.of(names) if names else UNKNOWN_USERS
    cases = config.privacy.deployments
    if workdir is not None:
        ledgers.check_extension(workdir, config, mechanism, users)
    entries = [
        *earlier,
        ledgers.run_entry("this run", config, mechanism, rounds, users, cases),
    ]
    sent = algorithms.sent_shapes(config, shapes)
    found = {
        "rounds": rounds,
        "cohort": config.cohort or population,
        "chunk": devices.known_chunk(config),
        "bytes_per_client": {
            "down": described[-1]["down_bytes"],
            "up": described[-1]["up_bytes"],
        },
        "clients": described,
        "privacy": describe.describe_privacy(mechanism, config, rounds, sent, entries, known),
    }
    if layout is None:
        return found
    name = "memory" if isinstance(layout, MemoryLayout) else "local"
    return found | {name: {"parameters": layout.size}}


def _rehearse_place(config: Config, workdir: str | Path | None, extend: int | None) -> Config:
    """The configuration that would be run in a directory, refused if that is another's."""
    existing = None if workdir is None else read_existing(Path(workdir))
    if extend is not None:
        config = extended(Path(workdir or "?"), existing, config, extend)
    known = _characters(config.data)
    start = starts.read_start(config.with_data(characters=known), existing, Path(workdir or "?"))
    if existing is None:
        return config
    ours = config.tree()
    ours["start"] = start_hash(start) if start is not None else existing.get("start", "")
    theirs = existing.get("data")
    theirs = theirs if isinstance(theirs, Mapping) else {}
    recorded = {name: theirs.get(name) for name in ("identity", "characters")}
    if config.data.dir and (directory := Path(config.data.dir)).exists():
        recorded["identity"] = corpora.content_hash(directory)
        recorded["characters"] = tokenizer_for(read_metadata(directory)).characters
    recorded["knowledge"] = decoders.knowledge_hash(config.decoding)
    ours["data"] |= recorded
    rounds = {} if extend is None else {"rounds": extend}
    check_same(Path(workdir or "?"), {**existing, **rounds}, ours)
    return config


def _rehearse(config: Config, directory: Path) -> int:
    """Makes all that a run on this data would train with, and nothing of it on disk.

    Returns:
      The number of training users.

    Raises:
      UserError: as the run would.
    """
    small = config.with_data(resident=False)  # not the data itself
    data = corpora.Data(directory, small, lambda text: None)
    used = devices.run_devices(config)
    pooled.check_central(config, data, used)
    selection.check(config, data)
    decoders.make_run_decoder(config.decoding, directory, data.tokenizer, data.evaluation)
    if config.has_rounds:
        with tempfile.TemporaryDirectory() as folder:
            store = None
            if layout := models.local_layout(config):
                users, prototype = len(data.train.users), config.local.prototype
                store = LocalStore(folder, layout, users, prototype)
            chunk = devices.known_chunk(config)
            chunk = 1 if isinstance(chunk, str) else chunk  # "auto"
            simulation = simulations.make_simulation(
                config, data, models.build_recogniser(config).loss, used, store, chunk
            )
        mechanisms.check_deployments(config, simulation.mechanism)
    return len(data.train.users)


def _rehearse_synthetic(config: Config) -> int:
    """Likewise as far as is known of the synthetic corpus before it is made."""
    from fedasr.data import synthetic

    settings = synthetic.SyntheticConfig(task=config.data.task)
    where = f"the synthetic corpus {settings.task!r}"
    check_splits(config, synthetic.SPLITS, where, lambda text: None)
    corpora.fitting_tokenizer(config, {"options": {"characters": CharTokenizer().characters}})
    corpora.check_features(config, {"options": {}})
    decoders.check_files(config.decoding)
    decoders.check_splits(config.decoding, synthetic.SPLITS, config.data.eval)
    population = synthetic.expected_users(settings, config.data.train)
    if config.has_rounds:
        mechanisms.check_deployments(
            config,
            mechanisms.make_mechanism(
                config, mechanisms.make_sampler(config, population), models.sent_parameters(config)
            ),
        )
    return population


def _characters(settings: Data) -> Any:
    """The alphabet of the data; None if it is not there."""
    if not settings.dir:
        return CharTokenizer().characters
    if not Path(settings.dir).exists():
        return None
    return tokenizer_for(read_metadata(settings.dir)).characters


def _user_names(settings: Data) -> Sequence[str] | None:
    """Ids of the training users, if the data is there."""
    if not settings.dir or not Path(settings.dir).exists():
        return None
    return open_corpus(settings.dir, settings.train).users
