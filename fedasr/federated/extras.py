"""What an algorithm exchanges and keeps beside the model: sent both ways, and remembered by users.

All that a client sends is one tree, `Sent`: it is clipped as a whole, so that one user moves the
sum by at most C whatever is in it, and the noise is on all of it. What the server sends follows
from noisy sums. What a client remembers is a row of a `fedasr.federated.local.LocalStore`, which
nobody else sees. So none of the three needs an argument about privacy of its own.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedasr.federated.client import Params
from fedasr.federated.subset import select


class Sent(NamedTuple):
    """What a client sends: its delta (old minus new) of the trained variables, and more."""

    model: Params
    extra: Any


class Broadcast(NamedTuple):
    """A part of the server optimiser's state, one at most, that clients get beside the model."""

    value: Any


class Versions(NamedTuple):
    """A part of the server optimiser's state: earlier models, for updates that began with them.

    past: like the trained variables, [versions, ...] each, the latest first.
    """

    past: Any


class Download(NamedTuple):
    """What clients get where there is a `Broadcast`: the model, or a view of it, and its value."""

    params: Any
    broadcast: Any


@dataclasses.dataclass(frozen=True)
class Extras:
    """An algorithm's own exchange.

    Attributes:
      train: train(params, broadcast, memory, batches, num_steps, key, max_steps, round) ->
        (sent, metrics, memory). `params` are the server's, `broadcast` the value of the optimiser's
        `Broadcast` or None, `memory` the client's own or None; the rest as in
        `fedasr.federated.client.ClientUpdate`. It sends a delta, or a `Sent` if there is a
        `message`; the new memory has the shapes and dtypes of the old.
      message: from the trained variables to the shapes of `Sent.extra`, arrays of float32; None for
        deltas alone.
      broadcast: whether clients get a `Broadcast`.
      discount: from an update's staleness to its weight, at most 1, where users hand in updates to
        earlier models (the sampler then has `staleness`); None where they do not.
      versions: of the model, that the server keeps for them, in `Versions` (the present one is not
        in it); older updates are thrown away.
      unaccounted: why it is refused where there is noise, in a line; "" if it is not.
    """

    train: Callable[..., tuple[Any, Any, Any]]
    message: Callable[[Params], Any] | None = None
    broadcast: bool = False
    discount: Callable[[int], float] | None = None
    versions: int = 1
    unaccounted: str = ""

    def sent_like(self, part: Params) -> Any:
        """Zeros (within `jit` or by `jax.eval_shape`) like what a client sends.

        Args:
          part: the trained variables, or their shapes.
        """
        return part if self.message is None else Sent(part, self.message(part))


def zeros_like(tree: Any) -> Any:
    """float32 zeros of the same shapes; also of `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def broadcast_of(opt_state: optax.OptState) -> Any:
    """The value of the one `Broadcast` in an optimiser's state."""
    return _the_one(opt_state, Broadcast).value


def past_of(opt_state: optax.OptState) -> Any:
    """The earlier models of the one `Versions` in an optimiser's state."""
    return _the_one(opt_state, Versions).past


def _the_one(opt_state: optax.OptState, kind: type) -> Any:
    found = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    (one,) = (x for x in found if isinstance(x, kind))
    return one


def server_chain(
    noise: optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
    sent_like: Callable[[Params], Any],
) -> optax.GradientTransformation:
    """`optax.chain` of two where what clients send is not shaped like the variables it is about.

    Args:
      noise: from the sum of what clients sent to its noisy mean, of the same shape.
      optimizer: from that to updates of the variables.
      sent_like: see `Extras`.
    """
    noise, optimizer = map(optax.with_extra_args_support, (noise, optimizer))

    def init(params):
        return noise.init(sent_like(params)), optimizer.init(params)

    def update(sent, state, params=None, **extra):
        mean, noise_state = noise.update(sent, state[0], None, **extra)
        updates, opt_state = optimizer.update(mean, state[1], params, **extra)
        return updates, (noise_state, opt_state)

    return optax.GradientTransformationExtraArgs(init, update)


class MemoryLayout:
    """How what a client remembers lies in its row of the store, float32; zeros at first.

    Args:
      params: the model's parameters, or their shapes.
      memory: from the trained variables to arrays of float32; their shapes alone matter.
      trained: for each variable in order, whether clients train it; None for all.
      personal: from the parameters and a user's memory to the user's own model; None where memory
        holds no model.
    """

    def __init__(
        self,
        params: Params,
        memory: Callable[[Params], Any],
        trained: Sequence[bool] | None = None,
        personal: Callable[[Params, Any], Params] | None = None,
    ) -> None:
        self.trained = None if trained is None else tuple(trained)
        self.shared = [True] * len(jax.tree.leaves(params)) if trained is None else list(trained)
        self.local = (False,) * len(self.shared)
        self.personal = personal
        like = jax.eval_shape(lambda p: memory(select(p, self.trained)), params)
        leaves, self._treedef = jax.tree.flatten(like)
        self._shapes = [x.shape for x in leaves]

    @property
    def size(self) -> int:
        """Numbers in a row."""
        return sum(map(math.prod, self._shapes))

    def extract(self, params: Params) -> np.ndarray:
        """The row of a user who has not been met, float32 [size]: zeros."""
        del params
        return np.zeros(self.size, np.float32)

    def pack(self, memory: Any) -> jax.Array:
        """A row, float32 [size]."""
        return jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(memory)])

    def unpack(self, row: jax.Array) -> Any:
        """What `pack` was given."""
        ends = np.cumsum([math.prod(shape) for shape in self._shapes])
        parts = jnp.split(row, ends[:-1])
        leaves = [x.reshape(shape) for x, shape in zip(parts, self._shapes, strict=True)]
        return jax.tree.unflatten(self._treedef, leaves)

    def insert(self, params: Params, row: jax.Array) -> Params:
        """The model of a user with that row: their own where there is one."""
        return params if self.personal is None else self.personal(params, self.unpack(row))


def as_client_update(extras: Extras, layout: MemoryLayout | None) -> Callable[..., Any]:
    """`Extras.train` with a row in place of memory, as `fedasr.federated.cohort` maps it.

    Args:
      extras: of an algorithm.
      layout: of its memory; None without one.
    """

    def split(view):
        return (view.params, view.broadcast) if extras.broadcast else (view, None)

    if layout is None:

        def forgetful(view, *args):
            sent, metrics, _ = extras.train(*split(view), None, *args)
            return sent, metrics

        return forgetful

    def update(view, row, *args):
        sent, metrics, memory = extras.train(*split(view), layout.unpack(row), *args)
        return sent, metrics, layout.pack(memory)

    return update
