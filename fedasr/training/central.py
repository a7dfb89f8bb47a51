"""Ordinary training on pooled data: seeds for federated training, and central baselines."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from fedasr.data.batching import Bucket, Padding, PooledBatcher, Prefetcher, pooled_buckets
from fedasr.data.corpus import Corpus
from fedasr.federated import hosts, subset
from fedasr.federated.client import Loss, Params
from fedasr.federated.cohort import (
    AXIS,
    MODEL,
    client_mesh,
    client_sharding,
    model_sharding,
    replicated,
    settled,
)
from fedasr.federated.server import ServerState, init_server, server_step
from fedasr.streams import Stream, seed_key

# Every bucket is a program to compile, padding is time in every step.
PADDING, MOST_BUCKETS = 0.12, 12


class CentralTraining:
    """Minibatch training with the users forgotten; the devices share each batch.

    Args:
      corpus: its examples are shuffled over all users, pass by pass.
      loss: see `fedasr.federated.client.Loss`.
      optimizer: any optax transformation.
      batch_size: examples per step over all devices; None with `frames`.
      seed: of the order of examples. keep: as for `fedasr.data.batching.Batching`.
      buckets: of its batches (see `PooledBatcher`); None for as few as pad little.
      multiples: of their sizes, then.
      devices: of this process; default all.
      frames: about so many frames per step over all devices (see `PooledBatcher`).
      steps_per_report: steps in one item of `run`.
      stream: what its randomness belongs to.
      model_devices: devices that hold the model together, see `client_mesh`.
      trained: for each variable in order, whether it is trained; None for all.
    """

    def __init__(
        self,
        corpus: Corpus,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        batch_size: int | None,
        *,
        seed: int,
        buckets: Sequence[Bucket] | None = None,
        multiples: Mapping[str, int] | None = None,
        frames: int | None = None,
        steps_per_report: int = 10,
        devices: Sequence[jax.Device] | None = None,
        select: Sequence[str] | None = None,
        model_devices: int = 1,
        stream: Stream = Stream.CENTRAL,
        trained: Sequence[bool] | None = None,
    ) -> None:
        self._mesh = client_mesh(devices or jax.local_devices(), model_devices)
        optimizer = subset.transform_part(optimizer, trained)
        self._optimizer, self._per_report = optimizer, steps_per_report
        # Every device needs an equal share; the padding examples are masked.
        batches = dict(batch_size=batch_size, frames=frames, multiple=self._mesh.shape[AXIS])
        if buckets is None:
            buckets = pooled_buckets(
                corpus, padding=PADDING, most=MOST_BUCKETS, multiples=multiples, **batches
            )
        self._batcher = PooledBatcher(
            corpus, buckets, seed, select=select, stream=stream, **batches
        )
        # An argument, no constant: other seeds find the compiled program in the cache.
        self._root = hosts.transfer_key(seed_key(seed, stream), replicated(self._mesh))

        def step(state: ServerState, batch, root):
            key = jax.random.fold_in(root, state.round)

            def of(part):
                return loss(subset.merge(part, state.params, trained), batch, key)

            part = subset.select(state.params, trained)
            (value, _), grads = jax.value_and_grad(of, has_aux=True)(part)
            state = server_step(state, grads, optimizer)
            return (settled(self._mesh, state) if model_devices > 1 else state), value

        self._step: Any = compiled_step(step, self._mesh)

    def padding(self, steps: int) -> Padding:
        """How much of the first `steps` batches is real; see `PooledBatcher.padding`."""
        return self._batcher.padding(steps)

    def compilations(self) -> int:
        """How many programs were compiled: at most one for each bucket and number of examples."""
        return self._step._cache_size()

    def init(self, params: Params) -> ServerState:
        """The state before the first step; its `round` counts optimiser steps."""
        return self.transfer(init_server(params, self._optimizer))

    def transfer(self, state: ServerState) -> ServerState:
        """Puts a state, such as a restored one, on every device."""
        return hosts.transfer(state, model_sharding(self._mesh, state))

    def run(self, state: ServerState, steps: int) -> Iterator[tuple[ServerState, int, float]]:
        """Trains until `steps` more steps are done.

        Yields:
          (state, steps done in all, mean loss since the last item) every `steps_per_report` steps
          and after the last.
        """
        return run_steps(
            self._step, self._root, self._batcher.batch, state, steps, self._per_report, self._mesh
        )


def compiled_step(step: Callable[[ServerState, Any, Any], Any], mesh: jax.sharding.Mesh) -> Any:
    """A step (state, batch, root key) -> (state, value) whose batch a mesh's devices share."""
    whole = replicated(mesh)
    where: dict[str, Any] = {
        "in_shardings": (whole, client_sharding(mesh), whole),
        "out_shardings": whole,
    }
    return jax.jit(step, **({} if MODEL in mesh.shape else where))


def run_steps(
    step: Any,
    root: Any,
    batch: Callable[[int], Mapping[str, np.ndarray]],
    state: ServerState,
    steps: int,
    per_report: int,
    mesh: jax.sharding.Mesh,
) -> Iterator[tuple[ServerState, int, float]]:
    """See `CentralTraining.run`; `step` is of `compiled_step`, `root` its key, `batch` of the
    number of a step."""
    first = int(state.round)

    def transfer(batch):
        return hosts.transfer(batch, client_sharding(mesh))

    losses = []
    with Prefetcher(map(batch, range(first, first + steps)), transfer=transfer) as prefetched:
        for done, prepared in enumerate(prefetched, first + 1):
            state, value = step(state, prepared, root)
            losses.append(value)
            if done % per_report == 0 or done == first + steps:
                yield state, done, float(np.mean(jax.device_get(losses)))
                losses = []
