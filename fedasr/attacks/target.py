"""The run that is attacked, and its own code for what clients do and what the server adds."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedasr.attacks.roll_call import RollCall
from fedasr.data.batching import eval_batches, make_buckets
from fedasr.data.corpus import Corpus, InMemoryCorpus
from fedasr.errors import UserError
from fedasr.federated.algorithms.fedavg import FedAvg
from fedasr.federated.hardware import Hardware
from fedasr.federated.simulation import Simulation
from fedasr.models.recogniser import ARRAYS, Recogniser
from fedasr.privacy.mechanism import Mechanism
from fedasr.streams import Stream, generator, key, make_root
from fedasr.training.builders import batches, clients, corpora, models, optimizers
from fedasr.training.checkpoint import restore_params
from fedasr.training.config import Config
from fedasr.training.evaluation import MULTIPLES
from fedasr.training.workdir import recorded_config

Examples = list[Any]
_BATCH = 16  # utterances whose losses are computed together


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much an attack tries.

    Attributes:
      users: targets. noise: multipliers to try. draws: of the noise for each target.
      rounds: of trainings that an attack observes. shadows: such trainings.
      candidates: among whom a planted name is looked for.
      seed: of all that is drawn.
    """

    users: int = 32
    noise: tuple[float, ...] = (0.0,)
    draws: int = 2
    rounds: int = 2
    shadows: int = 8
    candidates: int = 50
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Target:
    """A run whose clients and server are attacked.

    Attributes:
      config: of the run. data: its corpora. recogniser: its model.
      params: of the checkpoint that clients start from.
      devices: that compute.
    """

    config: Config
    data: Any
    recogniser: Recogniser
    params: Any
    devices: Sequence[jax.Device]

    def mechanism(self, sampler: Any, noise_multiplier: float | None) -> Mechanism:
        """The run's clipping with that much noise; None for neither."""
        privacy = self.config.privacy
        if noise_multiplier is None:
            return Mechanism(float("inf"), "global", 0.0, sampler)
        return Mechanism(
            privacy.clip_norm,
            privacy.budget,
            noise_multiplier,
            sampler,
            normalise=privacy.normalise,
        )

    def noise_of(self, noise_multiplier: float | None) -> float:
        """Standard deviation of the noise on each parameter of a sum of updates."""
        return (noise_multiplier or 0.0) * self.config.privacy.clip_norm

    def simulation(
        self, corpus: Corpus, mechanism: Mechanism, server: optax.GradientTransformation, name: str
    ) -> Simulation:
        """The run's rounds over other users.

        Args:
          corpus: of them.
          mechanism: with a sampler over them.
          server: the server's optimiser.
          name: tells this use's draws from those of others.
        """
        config = self.config
        update = clients.make_client_update(
            config, optimizers.local_update(config), self.recogniser.loss
        )
        return Simulation(
            corpus,
            mechanism,
            FedAvg(update, server, trained=models.trained_variables(config)),
            batches.make_batching(config, self.data.grid, None),
            hardware=Hardware(self.devices, chunk=1),
            seed=config.seed,
            identity=f"attack {name}",
        )

    def updates(self, corpus: Corpus, name: str) -> np.ndarray:
        """What each user would send, not clipped: float32 [users, parameters], old minus new."""
        users = len(corpus.users)
        sampler = RollCall(np.eye(users, dtype=bool), 1, 1.0)
        mechanism = self.mechanism(sampler, None)
        simulation = self.simulation(corpus, mechanism, optax.sgd(1.0), name)
        state, found = simulation.init(self.params), []
        before = flat(state.params)
        for _ in range(users):
            ((after, _),) = simulation.run(state, 1)
            found.append(before - flat(after.params))
            state = after._replace(params=state.params)
        return np.stack(found)

    def clipped(self, updates: np.ndarray) -> np.ndarray:
        """Updates as clients of a private run send them, by the run's own clipping code."""
        transform = self.mechanism(RollCall.one(), 0.0).client_transform()
        clip = jax.jit(lambda x: transform.update(x, transform.init(x))[0])
        return np.stack([flat(clip(self._tree(row))) for row in updates])

    def noised(
        self, updates: np.ndarray, noise_multiplier: float, seed: int, draws: int = 1
    ) -> np.ndarray:
        """Each update as the server would release the sum of it alone, by the run's own code.

        Other updates get other noise: who sees both could subtract them.

        Args:
          updates: float32 [users, parameters], clipped.
          noise_multiplier: above 0.
          seed: of the noise. draws: of it for each update.

        Returns:
          float32 [draws, users, parameters].
        """
        mechanism = self.mechanism(RollCall.one(), noise_multiplier)
        root = make_root("attack", seed, str(noise_multiplier), updates.tobytes())
        server = mechanism.server_transform(key(root, Stream.NOISE))
        state, step = server.init(self.params), jax.jit(server.update)
        found = np.empty((draws, *updates.shape), np.float32)
        for draw in range(draws):
            for user, row in enumerate(updates):
                released, state = step(self._tree(row), state)
                found[draw, user] = flat(released)
        return found

    def _tree(self, row: np.ndarray) -> Any:
        treedef: Any
        leaves, treedef = jax.tree.flatten(self.params)
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = np.split(row, ends[:-1])
        shaped = zip(parts, leaves, strict=True)
        return treedef.unflatten([jnp.asarray(part.reshape(leaf.shape)) for part, leaf in shaped])

    @functools.cached_property
    def evaluate(self) -> Any:
        """The recogniser's evaluation, compiled once."""
        return jax.jit(self.recogniser.evaluate)

    def losses(self, params: Any, examples: Examples) -> np.ndarray:
        """Of each example, without augmentation: float64 [examples], infinite where impossible."""
        corpus = InMemoryCorpus(
            {f"{i:09d}": [example] for i, example in enumerate(examples)}, ragged=ARRAYS
        )
        buckets = make_buckets([corpus], 1, MULTIPLES)
        found = np.full(len(examples), np.inf)
        for batch in eval_batches(corpus, buckets, min(_BATCH, len(examples)), ARRAYS, owners=True):
            owners, _ = batch.pop("user"), batch.pop("index")
            _, _, loss, valid = jax.device_get(self.evaluate(params, batch))
            here = np.flatnonzero(batch["mask"])
            found[owners[here]] = np.where(valid[here], loss[here], np.inf)
        return found


def load_target(workdir: str | Path, devices: Sequence[jax.Device] | None = None) -> Target:
    """The run of a work directory, at its last checkpoint (or its best).

    Args:
      workdir: of a run that has a checkpoint; its data is where it was.
      devices: that compute; default all local ones.

    Raises:
      UserError: there is no such run, or one whose clients cannot be attacked so.
    """
    path = Path(workdir) / "config.json"
    try:
        config = recorded_config(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{workdir} is no work directory of a run: it has no config.json"
        ) from error
    if config.local.patterns:
        raise UserError("local.patterns: attacks know no local parameters; attack another run")
    data = corpora.Data(corpora.data_directory(config), config, lambda text: None)
    params = jax.tree.map(jnp.asarray, restore_params(workdir))
    used = list(devices or jax.local_devices()[: config.devices or None])
    return Target(config, data, models.build_recogniser(config), params, used)


def flat(tree: Any) -> np.ndarray:
    """All leaves end to end, float32."""
    return np.concatenate([np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(tree)])


def choose_users(corpus: Corpus, count: int, seed: int, least: int = 2) -> list[int]:
    """Users with at least `least` examples, drawn without replacement, ascending.

    Raises:
      UserError: there are fewer than two.
    """
    able = np.flatnonzero(np.asarray(corpus.sizes) >= least)
    if len(able) < 2:
        raise UserError(f"an attack needs two users with at least {least} utterances each")
    rng = generator(Stream.ATTACK, "users", seed)
    return sorted(rng.choice(able, min(count, len(able)), replace=False).tolist())
