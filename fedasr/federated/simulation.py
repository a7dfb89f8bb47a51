"""One round of federated training, left to right, for any model and any corpus.

sampler -> batches -> vmap(client) -> clip -> sum -> /expected size -> noise -> server optimiser
"""

import collections
import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from fedasr.data.batching import (
    Bucket,
    Chunk,
    ClientBatcher,
    Grid,
    LocalBatches,
    Padding,
    Prefetcher,
    Resident,
)
from fedasr.data.corpus import Corpus
from fedasr.digests import params_digest
from fedasr.errors import UserError
from fedasr.federated import hosts
from fedasr.federated.client import ClientUpdate, Params
from fedasr.federated.cohort import (
    AXIS,
    MODEL,
    CohortSum,
    Weigh,
    client_mesh,
    client_sharding,
    make_cohort,
    model_sharding,
    replicated,
    rotation_key,
    settled,
)
from fedasr.federated.local import LocalStore, with_local
from fedasr.federated.server import ServerState, init_server, server_step
from fedasr.federated.subset import keep as keep_part
from fedasr.federated.subset import merge as merge_part
from fedasr.federated.subset import transform_part
from fedasr.privacy.adaptive import ClientView, hold, scales_of
from fedasr.privacy.clipping import layer_names
from fedasr.privacy.mechanism import Mechanism
from fedasr.streams import Stream, key, make_root, sub_seed

# What is drawn for clients and for the noise never meets: see `fedasr.streams`.
CLIENT_STREAM, NOISE_STREAM = Stream.CLIENTS, Stream.NOISE
_QUEUED = 4  # chunks on the devices beside the one in work: in the queue, in the thread's hand
_TURNS = 16  # clients that a CPU device trains in one call, at most, where it does not vmap them
_AHEAD = 2  # chunks that the devices may have in hand while local parameters are written


@dataclasses.dataclass(frozen=True)
class RoundMetrics:
    """What a round reports.

    round: counted from 1. loss: mean over valid clients of their mean training loss. clients,
    steps, invalid: clients that took part, their optimiser steps, clients whose update was not
    finite. norms, clipped: [layers], mean update norm before clipping, share of clients clipped.
    aux: sums of the loss's scalars. padding: see `Padding`. seconds: wall time of the round;
    waiting: its part spent waiting for data.
    """

    round: int
    loss: float
    clients: int
    steps: int
    invalid: int
    norms: np.ndarray
    clipped: np.ndarray
    clip_scales: np.ndarray
    aux: dict[str, Any]
    padding: Padding
    seconds: float
    waiting: float


class Draws(NamedTuple):
    """sampler: who takes part in a round. order: seed of `LocalBatches.plan`, for the examples."""

    sampler: Any
    order: int


class Simulation:
    """Federated learning of any model on simulated devices.

    Args:
      corpus: users and their examples.
      mechanism: sampler, clipping and noise; the one place that states the privacy.
      client_update: local training, such as `local_training(loss, optax.sgd(0.1))`.
      server_optimizer: any optax transformation; it sees the noisy mean of client deltas.
      local: how a client's examples become batches.
      seed: of everything random, with the run's identity: see `root_of`.
      identity: says what else tells this run from others of the same seed, such as its
        configuration; a string that equal runs share and no others.
      chunk: clients vmapped together on a device; 0 for the whole cohort. On a CPU 1 is fastest.
      buckets: padded lengths, see `fedasr.data.batching.ClientBatcher` (default: a `Grid`).
      devices: default all devices, of all processes (see `fedasr.federated.hosts`); each works on
        a part of every chunk.
      model_devices: so many neighbouring devices train a client together, for models that do not
        fit on one: each holds a part of every matrix that has an axis to divide, and of what the
        server and the sum keep of it.
        The result does not depend on it beyond the order of float additions. One process only.
      keep: names of the example arrays that the loss needs (default all).
      weights: of the users, in [0, 1], float [users], for a mechanism whose weighting is "bounded".
        A user's own may depend on their data and on what is public or private by itself (such as
        a noisy histogram), not otherwise on another user's data. The server divides by the
        expected cohort all the same, so that small weights are small steps.
      weigh: weights that devices decide in every round, likewise; both given, they multiply.
      trained: for each variable in order, whether `client_update` trains it: its deltas then hold
        these variables only (see `fedasr.federated.subset`). The rest get no clipping bound, no
        noise and no optimiser state, and stay as they are. None for all.
      store: the users' local parameters (see `fedasr.federated.local`), which `client_update`
        trains with the rest. Its layout must know `trained`, and its round be the state's:
        `store.restore` makes it so. None if all variables are shared; not together with `weigh`.
      micro_batch: above 0, batches are computed in parts of at most so many examples.
      resident: the corpus's examples, from `fedasr.data.batching.make_resident`, to put on every
        device at once: batches are then gathered there, and rounds read, pad and transfer nothing
        but indices. For corpora that fit there; None to read users' examples when they take part.
        Not together with `weigh`, whose batches are to be the client's own. One process only.
    """

    def __init__(
        self,
        corpus: Corpus,
        mechanism: Mechanism,
        client_update: ClientUpdate,
        server_optimizer: optax.GradientTransformation,
        local: LocalBatches,
        *,
        seed: int = 0,
        identity: str = "",
        chunk: int = 1,
        buckets: Sequence[Bucket] | Grid | None = None,
        devices: Sequence[jax.Device] | None = None,
        model_devices: int = 1,
        keep: Sequence[str] | None = None,
        weights: Sequence[float] | np.ndarray | None = None,
        weigh: Weigh | None = None,
        trained: Sequence[bool] | None = None,
        store: LocalStore | None = None,
        micro_batch: int = 0,
        resident: Resident | None = None,
    ) -> None:
        if mechanism.sampler.population != len(corpus.users):
            raise UserError(
                f"the sampler draws from {mechanism.sampler.population} users, "
                f"the corpus has {len(corpus.users)}"
            )
        if mechanism.weighting == "examples":
            weights = np.asarray(corpus.sizes, np.float32)
        else:
            weights = mechanism.check_weights(weights, len(corpus.users))
        if weigh is not None and (mechanism.weighting != "bounded" or mechanism.adaptive):
            raise UserError("weigh needs a mechanism with weighting='bounded', without adaptive")
        if weigh is not None and store is not None:
            raise UserError("weigh would judge a model without the user's local parameters")
        if mechanism.secure is not None and model_devices > 1:
            raise UserError("noise in shares rotates whole updates: it needs model_devices=1")
        if resident is not None and weigh is not None:
            raise UserError("weigh would be given the whole of a resident corpus")
        if resident is not None and jax.process_count() > 1:
            raise UserError("a resident corpus needs all devices in one process")
        self.mechanism = mechanism
        self.seed, self.identity = seed, identity
        self._users = corpus_digest(corpus)
        if model_devices > 1 and jax.process_count() > 1:
            raise UserError("model_devices above 1 needs all devices in one process")
        self.mesh = client_mesh(devices, model_devices)
        self._lanes = self.mesh.shape[AXIS]
        per_device = chunk or -(-mechanism.sampler.slots // self._lanes)
        self.chunk = per_device
        self.batcher = ClientBatcher(
            corpus,
            local,
            Grid() if buckets is None else buckets,
            per_device * self._lanes,
            seed,
            keep,
            self._lanes,
            weights,
            hosts.own_rows(self.mesh, per_device * self._lanes),
            micro_batch,
            self._most_turns(),
            resident,
        )
        self._resident = hosts.place(resident, replicated(self.mesh))
        self.store = store
        if store is not None:
            if jax.process_count() > 1:
                raise UserError("local parameters need all devices in one process")
            if store.users != len(corpus.users):
                raise UserError(
                    f"the local parameters are of {store.users} users, "
                    f"the corpus has {len(corpus.users)}"
                )
            if store.layout.trained != (None if trained is None else tuple(trained)):
                raise UserError("the layout of the local parameters does not know what is trained")
            mechanism.check_local(store.prototype)
            client_update = with_local(client_update, store.layout)
            trained = store.layout.shared
        self._round_key_of = jax.jit(
            lambda root, round: jax.random.fold_in(key(root, Stream.CLIENTS), round),
            out_shardings=replicated(self.mesh),
        )
        self._adaptive = mechanism.adaptive is not None
        if self._adaptive:
            client_update = _without_scales(client_update)
        self._trained = trained
        clip = mechanism.client_transform()
        clip = clip._replace(init=functools.partial(_init_part, clip.init, trained))
        self._cohort = make_cohort(
            client_update,
            clip,
            self.mesh,
            _for_all(weigh, trained),
            store is not None,
            per_device == 1,
            mechanism.encoder(),
        )
        if self._adaptive:
            server_optimizer = hold(server_optimizer, mechanism.adaptive.warmup)
        self._server_optimizer = server_optimizer

        def step(state, total, **extra):
            state = server_step(state, total, chain=self._chain(state.root), **extra)
            return settled(self.mesh, state) if model_devices > 1 else state

        self._step = jax.jit(step)
        self._reweigh = None
        if mechanism.weighting == "examples":
            # The server divides by the expected cohort; this makes that a division by the weights.
            expected = mechanism.sampler.expected_cohort
            self._reweigh = jax.jit(
                lambda total: jax.tree.map(
                    lambda d: d * (expected / jnp.maximum(total.weight, 1.0)), total.delta
                )
            )

    def _most_turns(self) -> int:
        """Clients that a device trains in one call. Accelerators queue calls: there, one."""
        if self.chunk > 1 or self.mesh.devices.flat[0].platform != "cpu":
            return 1
        return max(1, min(_TURNS, self.mechanism.sampler.slots // self._lanes))

    def _chain(self, root: Any) -> optax.GradientTransformation:
        """From the cohort's sum to the update, with the noise of a run."""
        noise = self.mechanism.server_transform(key(root, Stream.NOISE), key(root, Stream.VOTES))
        return transform_part(optax.chain(noise, self._server_optimizer), self._trained)

    def root_of(self, params: Params) -> np.ndarray:
        """The root of everything random in a run that starts from `params`, uint32 [8].

        It follows from the seed, the identity, the mechanism, the users and all bits of the
        parameters: the draws of two runs agree only where all of these do. So a run that starts
        where another ended has noise, cohorts and clients' randomness of its own.
        """
        return make_root(
            self.seed, self.identity, _numbers(self.mechanism), self._users, params_digest(params)
        )

    def init(self, params: Params, root: np.ndarray | None = None) -> ServerState:
        """The state before the first round, on every device.

        Args:
          params: to start from.
          root: uint32 [8]: None for `root_of`; or `fedasr.streams.secret_root()` where the noise
            must be such that nobody can compute it again. It is then in the state, and in
            checkpoints of it, alone.
        """
        root = self.root_of(params) if root is None else np.asarray(root, np.uint32)
        state = init_server(params, self._chain(root), root)
        return self.place(state)

    def draws(self, state: ServerState) -> Draws:
        """How users and their examples are drawn in the run of a state."""
        sampler, root = self.mechanism.sampler, _root(state)
        seed = sub_seed(root, Stream.SAMPLING, int(getattr(sampler, "seed", 0)))
        return Draws(sampler.reseeded(seed), sub_seed(root, Stream.EXAMPLES))

    def _round_key(self, round: Any, root: Any = None) -> jax.Array:
        root = make_root(self.seed) if root is None else root
        return self._round_key_of(root, round)

    def place(self, state: ServerState) -> ServerState:
        """Puts a state, such as a restored one, on every device."""
        return hosts.place(state, model_sharding(self.mesh, state))

    def _items(
        self, draws: Draws, first: int, last: int
    ) -> Iterator[tuple[Chunk | None, Padding, bool]]:
        """Chunks of the rounds first..last-1, each round ended by (None, padding, True)."""
        for round in range(first, last):
            total = Padding(0, 0)
            for chunk, padding in self.batcher.chunks(
                draws.sampler.cohort(round), round, draws.order
            ):
                total += padding
                yield chunk, padding, False
            yield None, total, True

    def _transfer(self, item: tuple[Any, Padding, bool]) -> tuple[Any, Padding, bool, Any]:
        chunk, padding, last = item
        users = None
        if chunk is not None and self.store is not None:
            users = np.where(chunk.num_steps > 0, chunk.user, -1)
        chunk = hosts.place_rows(chunk, client_sharding(self.mesh))
        if chunk is not None:
            chunk = chunk._replace(resident=self._resident)
        return chunk, padding, last, users

    def run(self, state: ServerState, rounds: int) -> Iterator[tuple[ServerState, RoundMetrics]]:
        """Trains, yielding the state and metrics after each of `rounds` more rounds.

        The next chunks are read and transferred by a thread while the devices compute.
        """
        first, root = int(state.round), _root(state)
        own = None if self.store is None else _OwnParameters(self.store, state)
        items = self._items(self.draws(state), first, first + rounds)
        with Prefetcher(items, transfer=self._transfer) as prefetched:
            round, sums = first, None
            began, waiting = time.perf_counter(), 0.0
            stream = iter(prefetched)
            while round < first + rounds:
                asked = time.perf_counter()
                chunk, padding, last, users = next(stream)
                waiting += time.perf_counter() - asked
                if not last:
                    clients = self._round_key(np.int32(round), root)
                    view = self._view(state)
                    if own is not None:
                        # Not by the thread, which reads ahead: a user's last round must be written.
                        rows = jax.device_put(own.gather(users), client_sharding(self.mesh))
                        chunk = chunk._replace(local=rows)
                    if sums is None:
                        sums = self._cohort.zeros(view, chunk)
                    sums = self._cohort.add(sums, view, chunk, clients, np.int32(round))
                    if own is not None:
                        sums, rows = sums
                        own.take_back(users, rows)
                    continue
                # A Poisson round may be empty: the server still adds its noise and steps.
                total = self._cohort.total(sums) if sums is not None else None
                scales = self._view(state).scales if self._adaptive else np.zeros(0, np.float32)
                state = self._step(state, self._delta(state, total), **self._votes(state, total))
                jax.block_until_ready(state.params)
                if own is not None:  # not before: a step that fails is done again
                    own.commit()
                seconds = time.perf_counter() - began
                scales = jax.device_get(scales)
                yield state, _metrics(round + 1, total, scales, padding, seconds, waiting)
                round, sums = round + 1, None
                began, waiting = time.perf_counter(), 0.0  # the caller's time is not the round's

    def _view(self, state: ServerState) -> Any:
        """What clients get: the parameters, with the bounds' scales where those adapt."""
        if not self._adaptive:
            return state.params
        return ClientView(state.params, scales_of(state.opt_state))

    def _votes(self, state: ServerState, total: CohortSum | None) -> dict[str, Any]:
        """What adaptive bounds, or noise in shares, need to know of a round."""
        if self.mechanism.secure is not None:
            rotation = rotation_key(self._round_key(np.int32(state.round), _root(state)))
            nobody = hosts.place(jnp.int32(0), replicated(self.mesh))
            return {"clients": nobody if total is None else total.clients, "rotation": rotation}
        if not self._adaptive:
            return {}
        if total is None:
            layers = len(self.layer_names(state.params))
            nobody = {"clipped": jnp.zeros(layers), "clients": jnp.float32(0)}
            return hosts.place(nobody, replicated(self.mesh))
        valid = (total.clients - total.invalid).astype(jnp.float32)
        return {"clipped": total.clipped, "clients": valid}

    def _delta(self, state: ServerState, total: CohortSum | None) -> Params:
        if total is not None:
            return self._reweigh(total) if self._reweigh else total.delta
        if self.mechanism.secure is not None:
            zeros = jnp.zeros(self.mechanism.encoding.dimension, jnp.int32)
            return hosts.place(zeros, replicated(self.mesh))
        like = keep_part(state.params, self._trained)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
        return hosts.place(zeros, model_sharding(self.mesh, zeros))

    def chunk_bytes(self, params: Params) -> int:
        """Bytes of a device's memory that rounds take, by compiling for the largest chunk.

        The largest of the first round with anybody in it: later ones may be larger, where there are
        several buckets or users with many steps. Counted are the compiled program, chunks on their
        way, the server's state and as much again for its step.

        Args:
          params: arrays or their shapes.
        """
        round, example = 0, None
        while example is None:
            example = self.batcher.example_chunk(self.mechanism.sampler.cohort(round), round)
            round += 1
        root = make_root(self.seed)
        state = jax.eval_shape(lambda p: init_server(p, self._chain(root), root), params)
        view = jax.eval_shape(self._view, state)
        chunk = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (x.shape[0] * self.chunk * self._lanes, *x.shape[1:]), x.dtype
            ),
            example,  # of one row, or of a device's turns
        )
        if self.store is not None:
            rows = (chunk.user.shape[0], self.store.layout.size)
            chunk = chunk._replace(local=jax.ShapeDtypeStruct(rows, np.float32))
        waiting = _QUEUED * _bytes(chunk) // self._lanes
        chunk = chunk._replace(resident=self._resident)
        sums = jax.eval_shape(self._cohort.zeros, view, chunk)
        clients = jax.eval_shape(self._round_key, 0)
        if MODEL in self.mesh.shape:
            sums = _laid(sums, model_sharding(self.mesh, sums, by_device=True))
            view = _laid(view, model_sharding(self.mesh, view))
        lowered = self._cohort.add.lower(sums, view, chunk, clients, np.int32(0))
        found = lowered.compile().memory_analysis()
        program = (
            found.argument_size_in_bytes
            + found.temp_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes
        )
        kept = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype),
            _laid(state, model_sharding(self.mesh, state)),
        )
        return int(program + waiting + 2 * _bytes(kept))

    def layer_names(self, params: Params) -> list[str]:
        """Names of the layers that metrics by layer are about: those of the trained variables."""
        return layer_names(keep_part(params, self._trained), self.mechanism.layers)

    def compilations(self) -> int:
        """Compiled shapes of the cohort's sum so far: one for each shape of chunk."""
        return self._cohort.add._cache_size()


def corpus_digest(corpus: Corpus) -> str:
    """Names a corpus by its users and their numbers of examples, in order."""
    sizes = ",".join(str(int(size)) for size in corpus.sizes)
    return hashlib.sha256(repr([list(map(str, corpus.users)), sizes]).encode()).hexdigest()


def _numbers(mechanism: Mechanism) -> str:
    """The mechanism's numbers, alike in every process (functions have addresses)."""
    said = [mechanism.clip_norm, mechanism.noise_multiplier, mechanism.normalise]
    said += [mechanism.weighting, mechanism.description, mechanism.released]
    said += [mechanism.sampler.population, mechanism.sampler.expected_cohort]
    said += [getattr(mechanism.sampler, "seed", 0), mechanism.adaptive]
    return repr([*said, mechanism.budget if isinstance(mechanism.budget, str) else "callable"])


def _root(state: ServerState) -> np.ndarray:
    if not hasattr(state.root, "shape"):
        raise UserError("the state belongs to no run: make it with Simulation.init")
    return np.asarray(state.root)


class _OwnParameters:
    """The cohort's local parameters on their way from the store to the devices and back."""

    def __init__(self, store: LocalStore, state: ServerState) -> None:
        if store.round != int(state.round):
            raise UserError(
                f"the local parameters are those after round {store.round}, the model is that "
                f"after round {int(state.round)}: restore them to it"
            )
        store.discard()  # of a round that was begun and not ended
        self._store = store
        self._init = np.asarray(store.layout.extract(state.params))  # the server leaves it alone
        self._pending: collections.deque = collections.deque()

    def gather(self, users: np.ndarray) -> np.ndarray:
        """float32 [clients, n]; zeros for empty slots (user -1)."""
        rows = np.zeros((len(users), len(self._init)), np.float32)
        rows[users >= 0] = self._store.gather(users[users >= 0], self._init)
        return rows

    def take_back(self, users: np.ndarray, rows: jax.Array) -> None:
        """Writes a chunk's new rows, when the devices have the next chunks in hand."""
        self._pending.append((users, rows))
        if len(self._pending) > _AHEAD:
            self._write_next()

    def commit(self) -> None:
        """Ends the round."""
        while self._pending:
            self._write_next()
        self._store.commit()

    def _write_next(self) -> None:
        users, rows = self._pending.popleft()
        self._store.write(users[users >= 0], np.asarray(rows)[users >= 0])


def _laid(tree: Any, sharding: Any) -> Any:
    """Shapes of arrays that lie as a sharding, or a tree of such, says."""
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), tree, sharding
    )


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _init_part(init: Any, trained: Sequence[bool] | None, view: Any) -> Any:
    """The clipping's state for the trained variables of what clients get."""
    if isinstance(view, ClientView):
        return init(view._replace(params=keep_part(view.params, trained)))
    return init(keep_part(view, trained))


def _for_all(weigh: Weigh | None, trained: Sequence[bool] | None) -> Weigh | None:
    """`weigh` with zeros in its update for what is not trained."""
    if weigh is None or trained is None:
        return weigh

    def weigh_all(params, delta, batches, key):
        whole = merge_part(delta, jax.tree.map(jnp.zeros_like, params), trained)
        return weigh(params, whole, batches, key)

    return weigh_all


def _without_scales(client_update: ClientUpdate) -> ClientUpdate:
    """The same client update for a `ClientView`: local training knows nothing of bounds."""

    def update(view, *args, **kwargs):
        return client_update(view.params, *args, **kwargs)

    return update


def _metrics(
    round: int,
    total: CohortSum | None,
    scales: np.ndarray,
    padding: Padding,
    seconds: float,
    waiting: float,
) -> RoundMetrics:
    if total is None:
        empty = np.zeros(0, np.float32)
        return RoundMetrics(
            round, float("nan"), 0, 0, 0, empty, empty, scales, {}, padding, seconds, waiting
        )
    host = jax.device_get(total._replace(delta=None))
    valid = max(int(host.clients - host.invalid), 1)
    return RoundMetrics(
        round=round,
        loss=float(host.loss) / valid if host.clients > host.invalid else float("nan"),
        clients=int(host.clients),
        steps=int(host.steps),
        invalid=int(host.invalid),
        norms=host.norms / valid,
        clipped=host.clipped / valid,
        clip_scales=scales,
        aux=jax.tree.map(lambda x: x.item(), host.aux),
        padding=padding,
        seconds=seconds,
        waiting=waiting,
    )
