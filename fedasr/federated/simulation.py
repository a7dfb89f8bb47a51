"""One round of federated training, left to right, for any model and any corpus.

sampler -> batches -> vmap(client) -> clip -> sum -> /expected size -> noise -> server optimiser
"""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from fedasr import stacks
from fedasr.data.batching import Batching, Padding, Prefetcher
from fedasr.data.corpus import Corpus
from fedasr.digests import params_digest
from fedasr.errors import UserError
from fedasr.federated import checks, hosts
from fedasr.federated.algorithms import (
    Algorithm,
    extras_of,
    participation_of,
    sent,
    sent_like,
)
from fedasr.federated.client import Params
from fedasr.federated.clientside import client_side
from fedasr.federated.cohort import (
    AXIS,
    CohortSum,
    client_sharding,
    make_cohort,
    model_sharding,
    replicated,
    rotation_key,
    settled,
)
from fedasr.federated.cohort_rows import CohortRows
from fedasr.federated.extras import Download, MemoryLayout, broadcast_of, past_of, server_chain
from fedasr.federated.hardware import Hardware
from fedasr.federated.metrics import RoundMetrics, round_metrics
from fedasr.federated.participation import Turnout, async_turnout
from fedasr.federated.server import ServerState, init_server, server_step
from fedasr.federated.subset import merge, transform_part
from fedasr.federated.weights import by_weight, user_weights
from fedasr.kernels.devices import lowered
from fedasr.privacy.adaptive import ClientView, hold, scales_of
from fedasr.privacy.clipping import layer_names
from fedasr.privacy.mechanism import Mechanism
from fedasr.streams import Stream, key, make_root, sub_seed

# What is drawn for clients and for the noise never meets: see `fedasr.streams`.
CLIENT_STREAM, NOISE_STREAM = Stream.CLIENTS, Stream.NOISE
_QUEUED = 4  # chunks on the devices beside the one in work: in the queue, in the thread's hand
_TURNS = 16  # clients that a CPU device trains in one call, at most, where it does not vmap them


class Draws(NamedTuple):
    """sampler: who takes part in a round. order: seed of `LocalBatches.plan`, for the examples."""

    sampler: Any
    order: int


class Item(NamedTuple):
    """A part of a round on its way to the devices.

    chunk: of clients; None at a round's end. padding: of the chunk, or of the round. age: of the
    parameters that the clients get, in rounds. turnout: at a round's end, of simulated devices.
    users: of the chunk, -1 for empty slots, where they have local rows. lost: nothing of what the
    chunk's clients send arrives.
    """

    chunk: Any
    padding: Padding
    age: int = 0
    turnout: Turnout | None = None
    users: np.ndarray | None = None
    lost: bool = False


class _Arguments(NamedTuple):
    """Shapes. state: the server's. of_clients: of the cohort's `add`. total, votes: of the step."""

    state: ServerState
    of_clients: tuple[Any, ...]
    total: Params
    votes: dict[str, Any]


class Simulation:
    """Federated learning of any model on simulated devices.

    Args:
      corpus: users and their examples.
      mechanism: sampler, clipping and noise; the one place that states the privacy.
      algorithm: what clients train and the server does with it, such as
        `FedAvg(local_training(loss, optax.sgd(0.1)), optax.adam(0.01))`.
      batching: how a client's examples become batches.
      hardware: default all devices, each with one client at a time.
      seed: of everything random, with the run's identity: see `root_of`.
      identity: says what else tells this run from others of the same seed, such as its
        configuration; a string that equal runs share and no others.

    Raises:
      UserError: for parts that do not go together: see `fedasr.federated.checks`.
    """

    def __init__(
        self,
        corpus: Corpus,
        mechanism: Mechanism,
        algorithm: Algorithm,
        batching: Batching,
        *,
        hardware: Hardware = Hardware(),
        seed: int = 0,
        identity: str = "",
    ) -> None:
        checks.check(corpus, mechanism, algorithm, batching, hardware)
        self._participation = participation_of(algorithm)
        checks.dropout_is_accounted(mechanism, self._participation, corpus)
        self.mechanism, self.store = mechanism, algorithm.store
        self.seed, self.identity = seed, identity
        self._users = corpus_digest(corpus)
        self.mesh = hardware.tried_mesh()
        self._lanes = self.mesh.shape[AXIS]
        self.chunk = hardware.clients_at_once(self.mesh, mechanism.sampler.slots)
        self.batcher = batching.batcher(
            corpus,
            self.chunk * self._lanes,
            seed,
            devices=self._lanes,
            weights=user_weights(corpus, mechanism, algorithm),
            rows=hosts.process_rows(self.mesh, self.chunk * self._lanes),
            turns=self._most_turns(),
        )
        self._resident = hosts.transfer(batching.resident, replicated(self.mesh))
        self._round_key_of = jax.jit(
            lambda root, round: jax.random.fold_in(key(root, Stream.CLIENTS), round),
            out_shardings=replicated(self.mesh),
        )
        self._adaptive = mechanism.adaptive is not None
        # While the server's state stands still, so does what users remember of its counterpart.
        remembers = self.store is not None and isinstance(self.store.layout, MemoryLayout)
        self._still = mechanism.adaptive.warmup if mechanism.adaptive and remembers else 0
        self._trained, self._extras = sent(algorithm), extras_of(algorithm)
        self._discount = None if self._extras is None else self._extras.discount
        self._versions = self._extras.versions if self._extras else 1
        self._earlier = jax.jit(self._version)
        self._sent_like = functools.partial(sent_like, algorithm)
        client = client_side(mechanism, algorithm)
        stacked = checks.may_stack(mechanism, algorithm, hardware)
        self._cohort = make_cohort(
            client.client_update,
            client.clip,
            self.mesh,
            client.weigh,
            local=self.store is not None,
            in_turns=self.chunk == 1,
            encode=mechanism.encoder(),
            stacked=stacked,
        )
        self._server_optimizer = algorithm.server_optimizer
        if mechanism.adaptive is not None:
            self._server_optimizer = hold(self._server_optimizer, mechanism.adaptive.warmup)
        self._step = jax.jit(self._make_step(hardware.model_devices > 1))
        self._steps_on_stacks = stacked and checks.server_may_stack(mechanism, algorithm)
        self._stack, self._unstack = (
            jax.jit(change, out_shardings=replicated(self.mesh))
            for change in (stacks.stack_within, stacks.unstack_within)
        )
        self._reweigh = by_weight(mechanism) if mechanism.weighting == "examples" else None

    def _make_step(self, split: bool) -> Callable[..., ServerState]:
        """The server's step; `split` where a client's devices each hold a part of the state."""

        def step(state, total, **extra):
            state = server_step(state, total, chain=self._chain(state.root), **extra)
            return settled(self.mesh, state) if split else state

        return step

    def _most_turns(self) -> int:
        """Clients that a device trains in one call. Accelerators queue calls: there, one."""
        if self.chunk > 1 or self.mesh.devices.flat[0].platform != "cpu":
            return 1
        return max(1, min(_TURNS, self.mechanism.sampler.slots // self._lanes))

    def _chain(self, root: Any) -> optax.GradientTransformation:
        """From the cohort's sum to the update, with the noise of a run."""
        noise = self.mechanism.server_transform(key(root, Stream.NOISE), key(root, Stream.VOTES))
        if self._extras is None or self._extras.message is None:
            chain = optax.chain(noise, self._server_optimizer)
        else:
            chain = server_chain(noise, self._server_optimizer, self._extras.sent_like)
        return transform_part(chain, self._trained)

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
        return self.transfer(state)

    def draws(self, state: ServerState) -> Draws:
        """How users and their examples are drawn in the run of a state."""
        sampler, root = self.mechanism.sampler, _root(state)
        seed = sub_seed(root, Stream.SAMPLING, int(getattr(sampler, "seed", 0)))
        return Draws(sampler.reseeded(seed), sub_seed(root, Stream.EXAMPLES))

    def _round_key(self, round: Any, root: Any = None) -> jax.Array:
        root = make_root(self.seed) if root is None else root
        return self._round_key_of(root, round)

    def transfer(self, state: ServerState) -> ServerState:
        """Puts a state, such as a restored one, on every device."""
        return hosts.transfer(state, model_sharding(self.mesh, state))

    def _items(self, draws: Draws, first: int, last: int) -> Iterator[Item]:
        """Chunks of the rounds first..last-1; after each round an item without a chunk."""
        for round in range(first, last):
            total = Padding(0, 0)
            users, turnout = draws.sampler.cohort(round), None
            if self._participation is not None:
                steps = [self.batcher.steps(int(user), round, draws.order) for user in users]
                turnout = self._participation.turnout(round, [int(u) for u in users], steps)
                users = turnout.arrived
            for age, own, weight in self._by_age(draws.sampler, round, users):
                for chunk, padding in self.batcher.chunks(own, round, draws.order):
                    total += padding
                    chunk = chunk._replace(weight=chunk.weight * weight)
                    yield Item(chunk, padding, age=age)
            if turnout is not None and self.store is not None:  # they remember what they did
                for chunk, padding in self.batcher.chunks(turnout.lost, round, draws.order):
                    total += padding
                    yield Item(chunk, padding, lost=True)
            if self._discount is not None:
                turnout = async_turnout(draws.sampler, round, self._versions)
            yield Item(None, total, turnout=turnout)

    def _by_age(
        self, sampler: Any, round: int, users: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray, np.float32]]:
        """A round's users by the staleness of their updates, and the weight of these."""
        if self._discount is None:
            yield 0, users, np.float32(1)
            return
        ages = sampler.staleness(round)
        for age in np.unique(ages[ages < self._versions]):
            yield int(age), users[ages == age], np.float32(min(1.0, self._discount(int(age))))

    def _transfer(self, item: Item) -> Item:
        chunk, users = item.chunk, None
        if chunk is not None and self.store is not None:
            users = np.where(chunk.num_steps > 0, chunk.user, -1)
        chunk = hosts.transfer_rows(chunk, client_sharding(self.mesh))
        if chunk is not None:
            chunk = chunk._replace(resident=self._resident)
        return item._replace(chunk=chunk, users=users)

    def run(self, state: ServerState, rounds: int) -> Iterator[tuple[ServerState, RoundMetrics]]:
        """Trains, yielding the state and metrics after each of `rounds` more rounds.

        The next chunks are read and transferred by a thread while the devices compute.
        """
        first, root = int(state.round), _root(state)
        cohort_rows = (
            None if self.store is None else CohortRows(self.store, int(state.round), state.params)
        )
        items = self._items(self.draws(state), first, first + rounds)
        state = self._held(state)
        with Prefetcher(items, transfer=self._transfer) as prefetched:
            round, sums = first, None
            age, view = -1, None  # what the last chunk's clients got
            began, waiting = time.perf_counter(), 0.0
            stream = iter(prefetched)
            while round < first + rounds:
                asked = time.perf_counter()
                item = next(stream)
                chunk, users = item.chunk, item.users
                if users is not None and round < self._still:
                    users = np.full_like(users, -1)
                waiting += time.perf_counter() - asked
                if chunk is not None:
                    clients = self._round_key(np.int32(round), root)
                    if item.age != age:
                        age, view = item.age, self._cohort.ready(self._view(state, item.age))
                    if cohort_rows is not None:
                        # Not by the thread, which reads ahead: a user's last round must be written.
                        rows = cohort_rows.gather(users)
                        rows = hosts.transfer_rows(rows, client_sharding(self.mesh))
                        chunk = chunk._replace(local=rows)
                    if (into := None if item.lost else sums) is None:
                        into = self._cohort.zeros(view, chunk)
                    into = self._cohort.add(into, view, chunk, clients, np.int32(round))
                    if cohort_rows is not None:
                        into, rows = into
                        cohort_rows.take_back(users, rows)
                    sums = sums if item.lost else into
                    continue
                age, view = -1, None
                # A Poisson round may be empty: the server still adds its noise and steps.
                total = self._total(state, sums) if sums is not None else None
                scales = self._view(state).scales if self._adaptive else np.zeros(0, np.float32)
                state = self._step(state, self._delta(state, total), **self._votes(state, total))
                given = self._given(state)
                jax.block_until_ready(given.params)
                if cohort_rows is not None:  # not before: a step that fails is done again
                    cohort_rows.commit()
                seconds = time.perf_counter() - began
                scales = jax.device_get(scales)
                spent = item.padding, seconds, waiting, item.turnout
                yield given, round_metrics(round + 1, total, scales, *spent)
                round, sums = round + 1, None
                began, waiting = time.perf_counter(), 0.0  # the caller's time is not the round's

    def _held(self, state: ServerState) -> ServerState:
        """The state as the server's step takes it: its blocks stacked where they can be."""
        can = self._steps_on_stacks and stacks.can_stack(state.params)
        return self._stack(state) if can else state

    def _given(self, state: ServerState) -> ServerState:
        """The state before `_held`."""
        return self._unstack(state) if stacks.is_stacked(state.params) else state

    def _total(self, state: ServerState, sums: CohortSum) -> CohortSum:
        if stacks.is_stacked(state.params):
            return self._cohort.total(sums, stacked=True)
        return self._cohort.total(sums)

    def _view(self, state: ServerState, age: int = 0) -> Any:
        """What clients get: the parameters, with a broadcast, and scales of bounds that adapt.

        Args:
          state: of the server. age: of the parameters, in rounds.
        """
        view = state.params if age == 0 else self._earlier(state, np.int32(age))
        if self._extras is not None and self._extras.broadcast:
            view = Download(view, broadcast_of(state.opt_state))
        return ClientView(view, scales_of(state.opt_state)) if self._adaptive else view

    def _version(self, state: ServerState, age: jax.Array) -> Params:
        """The parameters of so many rounds ago, at least one."""
        past = jax.tree.map(lambda x: x[age - 1], past_of(state.opt_state))
        return settled(self.mesh, merge(past, state.params, self._trained))

    def _votes(self, state: ServerState, total: CohortSum | None) -> dict[str, Any]:
        """What adaptive bounds, or noise in shares, need to know of a round."""
        if self.mechanism.secure is not None:
            rotation = rotation_key(self._round_key(np.int32(state.round), _root(state)))
            nobody = hosts.transfer(jnp.int32(0), replicated(self.mesh))
            return {"clients": nobody if total is None else total.clients, "rotation": rotation}
        if not self._adaptive:
            return {}
        if total is None:
            layers = len(self.layer_names(state.params))
            nobody = {"clipped": jnp.zeros(layers), "clients": jnp.float32(0)}
            return hosts.transfer(nobody, replicated(self.mesh))
        valid = (total.clients - total.invalid).astype(jnp.float32)
        return {"clipped": total.clipped, "clients": valid}

    def _delta(self, state: ServerState, total: CohortSum | None) -> Params:
        if total is not None:
            return self._reweigh(total) if self._reweigh else total.delta
        if self.mechanism.secure is not None:
            zeros = jnp.zeros(self.mechanism.encoding.dimension, jnp.int32)
            return hosts.transfer(zeros, replicated(self.mesh))
        like = jax.eval_shape(self._sent_like, state.params)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
        return hosts.transfer(zeros, model_sharding(self.mesh, zeros))

    def chunk_bytes(self, params: Params) -> int:
        """Bytes of a device's memory that rounds take, by compiling for the largest chunk.

        Counted are the compiled program and what is held beside it, or what the server's step holds
        if that is more: states before and after, the one that was given out where that is another,
        the sum, and as much three times for noise on its way.

        Args:
          params: arrays or their shapes.
        """
        arguments = self._arguments(params)
        kept, total = (_bytes_here(x) for x in (arguments.state, arguments.total))
        step = 2 * kept + self.beside_bytes(params, "server") + 4 * total
        traced = self._cohort.add.trace(*arguments.of_clients)
        found: Any = lowered(traced, self.mesh).compile().memory_analysis()
        return max(program_bytes(found) + self.beside_bytes(params), step)

    def beside_bytes(self, params: Params, program: str = "clients") -> int:
        """Bytes of a device's memory that are held beside a program of `trace`.

        Beside clients' they are chunks on their way, the server's state and as much again: for its
        step, or since whoever runs rounds has one without stacks. That is there in the step, too.
        """
        arguments = self._arguments(params)
        kept = _bytes_here(arguments.state)
        if program == "server":
            return kept if stacks.is_stacked(arguments.state.params) else 0
        _, _, chunk, *_ = arguments.of_clients
        waiting = _QUEUED * _bytes(chunk._replace(resident=None)) // self._lanes
        return waiting + 2 * kept

    def trace(self, params: Params) -> dict[str, jax.stages.Traced]:
        """The programs of a round, to lower for the simulation's devices, which need not be there.

        Args:
          params: arrays or their shapes.

        Returns:
          "clients": training of the largest chunk and adding it up; "server": the noise and the
          optimiser's step.
        """
        arguments = self._arguments(params)
        return {
            "clients": self._cohort.add.trace(*arguments.of_clients),
            "server": self._step.trace(arguments.state, arguments.total, **arguments.votes),
        }

    def _arguments(self, params: Params) -> _Arguments:
        """What the programs of a round are called with, as shapes.

        The chunk is the largest of the first round with anybody in it: later ones may be larger,
        where there are several buckets or users with many steps.
        """
        round, example = 0, None
        while example is None:
            example = self.batcher.example_chunk(self.mechanism.sampler.cohort(round), round)
            round += 1
        root, whole = make_root(self.seed), replicated(self.mesh)
        state = jax.eval_shape(
            lambda p: self._held(init_server(p, self._chain(root), root)), params
        )
        view = jax.eval_shape(lambda state: self._cohort.ready(self._view(state)), state)
        chunk = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (x.shape[0] * self.chunk * self._lanes, *x.shape[1:]), x.dtype
            ),
            example,  # of one row, or of a device's turns
        )
        if self.store is not None:
            rows = (chunk.user.shape[0], self.store.layout.size)
            chunk = chunk._replace(local=jax.ShapeDtypeStruct(rows, np.float32))
        chunk = _laid(chunk, client_sharding(self.mesh))._replace(resident=self._resident)
        sums = jax.eval_shape(self._cohort.zeros, view, chunk)
        key = _laid(jax.eval_shape(self._round_key, 0), whole)
        sums = _laid(sums, model_sharding(self.mesh, sums, by_device=True))
        total = jax.eval_shape(lambda sums: self._total(state, sums), sums)
        first = state._replace(round=np.int32(0), root=root)  # which votes may read as numbers
        votes = jax.eval_shape(lambda total: self._votes(first, total), total)
        delta = jax.eval_shape(self._delta, state, total)
        return _Arguments(
            _laid(state, model_sharding(self.mesh, state)),
            (sums, _laid(view, model_sharding(self.mesh, view)), chunk, key, np.int32(0)),
            _laid(delta, model_sharding(self.mesh, delta)),
            _laid(votes, whole),
        )

    def layer_names(self, params: Params) -> list[str]:
        """Names of the layers that metrics by layer are about: those of what clients send."""
        return layer_names(jax.eval_shape(self._sent_like, params), self.mechanism.layers)

    def compilations(self) -> int:
        """Compiled shapes of the cohort's sum so far: one for each shape of chunk."""
        add: Any = self._cohort.add
        return add._cache_size()


def corpus_digest(corpus: Corpus) -> str:
    """Names a corpus by its users and their numbers of examples, in order."""
    sizes = ",".join(str(int(size)) for size in corpus.sizes)
    return hashlib.sha256(repr([list(map(str, corpus.users)), sizes]).encode()).hexdigest()


def _numbers(mechanism: Mechanism) -> str:
    """The mechanism's numbers, alike in every process (functions have addresses)."""
    said: list[Any] = [mechanism.clip_norm, mechanism.noise_multiplier, mechanism.normalise]
    said += [mechanism.weighting, mechanism.description, mechanism.released]
    said += [mechanism.sampler.population, mechanism.sampler.expected_cohort]
    said += [getattr(mechanism.sampler, "seed", 0), mechanism.adaptive]
    return repr([*said, mechanism.budget if isinstance(mechanism.budget, str) else "callable"])


def _root(state: ServerState) -> np.ndarray:
    if not hasattr(state.root, "shape"):
        raise UserError("the state belongs to no run: make it with Simulation.init")
    return np.asarray(state.root)


def _laid(tree: Any, sharding: Any) -> Any:
    """Shapes of arrays that lie as a sharding, or a tree of such, says."""
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding
    )


def program_bytes(memory: Any) -> int:
    """Bytes of a device's memory that a compiled program takes, by its `memory_analysis`."""
    return int(
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _bytes_here(tree: Any) -> int:
    """Of shapes with their shardings, what one device has."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
