"""What the benchmarks share: random speech, plain training and the measurement of memory."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class RandomSpeech:
    """A corpus of random features that are made when read: its size costs no memory.

    Args:
      sizes: examples of each user. frames, labels: of every example.
    """

    def __init__(self, sizes: Sequence[int], frames: int, labels: int = 20) -> None:
        self.users = [f"user-{i}" for i in range(len(sizes))]
        self.sizes = np.asarray(sizes, np.int64)
        self._frames, self._labels = frames, labels

    def lengths(self, user: int) -> dict[str, np.ndarray]:
        """See `fedasr.data.corpus.Corpus`."""
        count = int(self.sizes[user])
        return {
            "features": np.full(count, self._frames, np.int32),
            "labels": np.full(count, self._labels, np.int32),
        }

    def get(self, user: int, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """See `fedasr.data.corpus.Corpus`."""
        examples = []
        for index in indices:
            rng = np.random.default_rng([user, index])
            features = rng.standard_normal((self._frames, 80), np.float32)
            labels = rng.integers(1, 30, self._labels).astype(np.int32)
            examples.append({"features": features.astype(np.float16), "labels": labels})
        return examples


class Plain(NamedTuple):
    """Local training without a framework: SGD on clipped gradients.

    one_by_one(params, batches, counts): as many jitted steps for each client, one call after
    another, and the sum of what they came to. central(params, batches, count): one jitted loop.
    Both take a list of batches and begin it anew at its end.
    """

    one_by_one: Callable[..., Any]
    central: Callable[..., Any]


def plain_training(loss: Any, rate: float = 0.1) -> Plain:
    """What rounds are compared with; `loss` as for `fedasr.federated.client.local_training`."""
    import jax
    import jax.numpy as jnp
    import optax

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))

    def step(params, batch, key):
        grads = jax.grad(loss, has_aux=True)(params, batch, key)[0]
        updates, _ = optimizer.update(grads, optimizer.init(params))
        return optax.apply_updates(params, updates)

    one_step = jax.jit(step)
    add = jax.jit(lambda a, p, q: jax.tree.map(lambda x, y, z: x + y - z, a, p, q))

    def one_by_one(params, batches, counts):
        total = jax.tree.map(jnp.zeros_like, params)
        for client, count in enumerate(counts):
            local, key = params, jax.random.key(client)
            for i in range(count):
                local = one_step(local, batches[i % len(batches)], jax.random.fold_in(key, i))
            total = add(total, params, local)
        return total

    @jax.jit
    def central(params, batches, count):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)

        def body(i, local):
            batch = jax.tree.map(lambda x: x[i % len(batches)], stacked)
            return step(local, batch, jax.random.fold_in(jax.random.key(0), i))

        return jax.lax.fori_loop(0, count, body, params)

    return Plain(one_by_one, central)


def peak_rss_mb(action: Callable[[], object]) -> float:
    """Peak resident memory during `action`, MB (outside Linux: since the process started)."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if clear.exists():
        clear.write_text("5")  # resets the high-water mark
        action()
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    action()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
