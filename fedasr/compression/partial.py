"""Partial model training (arXiv 2110.05607): clients train and upload some of the variables.

Which ones is decided by a `Subset`:

* "fixed": those whose path matches a pattern, for good. The rest have no gradient, no optimiser
  state on either side, no noise and no upload; their share of the backward pass is not compiled.
* "round": weight matrices are dealt into groups of about equal size, and all clients of a round
  train one group, drawn by the round. As many programs as groups are compiled, each without the
  backward work of the others.
* "user": every client trains its own random share of the weight matrices, drawn by its key. A
  simulation of many clients in one program computes all gradients and leaves some out; a
  device does not need to (`fedasr.compression.device.fedsgd_program`).

With "round" and "user" biases, norms and the like are trained by everybody. The server's optimiser
and noise then know all variables: noise on those that nobody trained in a round is the price.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedasr.compression.online import choose, flags, weight_matrices
from fedasr.errors import UserError
from fedasr.federated.client import ClientUpdate, Loss
from fedasr.federated.subset import check_patterns, matches, merge, select
from fedasr.streams import Stream, fold, seed_key


@dataclasses.dataclass(frozen=True)
class Subset:
    """Which variables are trained; see the module's docstring.

    Attributes:
      mode: "fixed", "round" or "user".
      patterns: of "fixed": regular expressions, searched for in paths such as
        "block_0/attention/qkv/kernel".
      groups: of "round".
      share: of "user": part of the weight matrices, in (0, 1].
      seed: draws the rounds' groups.
      setting: what the patterns are called, for messages.

    Raises:
      UserError: for an unknown mode, a bad pattern or a number out of range.
    """

    mode: str
    patterns: tuple[str, ...] = ()
    groups: int = 1
    share: float = 1.0
    seed: int = 0
    setting: str = "partial.patterns"

    def __post_init__(self) -> None:
        if self.mode not in ("fixed", "round", "user"):
            raise UserError(f"partial.mode={self.mode!r}: choose 'fixed', 'round' or 'user'")
        if self.mode == "fixed":
            check_patterns(self.patterns, self.setting)
        if self.groups < 1:
            raise UserError(f"partial.groups={self.groups} must be at least 1")
        if not 0 < self.share <= 1:
            raise UserError(f"partial.share={self.share} must be above 0 and at most 1")

    def trained(self, params: Any) -> list[bool] | None:
        """For each variable in order, whether it is ever trained; None if all are.

        Args:
          params: any pytree of arrays or of their shapes.

        Raises:
          UserError: if a pattern matches no path.
        """
        return self._matching(params) if self.mode == "fixed" else None

    def _matching(self, params: Any) -> list[bool]:
        found = matches(params, self.patterns, self.setting)
        if not any(found):
            raise UserError(f"{self.setting}: nothing would be trained")
        return found

    def draw(self, params: Any, key: jax.Array) -> list[bool]:
        """One client's variables of one round, concretely; for "round" those of a first group."""
        if self.mode == "fixed":
            return self._matching(params)
        if self.mode == "round":
            return [group in (None, 0) for group in deal(params, self.groups)]
        matrices = flags(params, weight_matrices)
        drawn = iter(choose(key, sum(matrices), self.share))
        return [bool(next(drawn)) if matrix else True for matrix in matrices]

    def uploaded(self, params: Any) -> list[float]:
        """For each variable in order, the probability that a client uploads it in a round."""
        if self.mode == "fixed":
            return [float(x) for x in self._matching(params)]
        share = self.share if self.mode == "user" else 1 / self.groups
        return [share if matrix else 1.0 for matrix in flags(params, weight_matrices)]


def partial_training(
    make_update: Callable[[Loss], ClientUpdate], loss: Loss, subset: Subset
) -> ClientUpdate:
    """Local training of a subset of the variables.

    Args:
      make_update: from a loss to a client update, such as `lambda loss: local_training(loss,
        optax.sgd(0.1))`.
      loss: see `fedasr.federated.client.Loss`.
      subset: which variables.

    Returns:
      A `ClientUpdate`. With "fixed", for `FedAvg(..., trained=subset.trained(params))`: its
      delta holds the trained variables only (see `fedasr.federated.subset`). Otherwise the
      delta of a variable that was not trained is exactly zero.
    """
    if subset.mode == "fixed":

        def fixed(params, *args, **kwargs):
            return _train(make_update, loss, params, subset.trained(params), *args, **kwargs)

        return fixed
    if subset.mode == "round":
        return _by_round(make_update, loss, subset)
    return _by_user(make_update, loss, subset)


def _train(make_update, loss, params, trained, *args, **kwargs):
    """(delta of the trained variables only, metrics); to the rest no gradient is computed."""

    def of(part, batch, key):
        return loss(merge(part, params, trained), batch, key)

    return make_update(of)(select(params, trained), *args, **kwargs)


def _by_round(make_update, loss, subset):
    def update(params, batches, num_steps, key, max_steps=None, round=0):
        def branch(group):
            trained = [g in (None, group) for g in deal(params, subset.groups)]

            def run(_):
                args = (batches, num_steps, key, max_steps, round)
                delta, metrics = _train(make_update, loss, params, trained, *args)
                return merge(delta, jax.tree.map(jnp.zeros_like, params), trained), metrics

            return run

        round_key = jax.random.fold_in(seed_key(subset.seed, Stream.SUBSET), round)
        group = jax.random.randint(round_key, (), 0, subset.groups)
        return jax.lax.switch(group, [branch(g) for g in range(subset.groups)], None)

    return update


def _by_user(make_update, loss, subset):
    def update(params, batches, num_steps, key, max_steps=None, round=0):
        matrices = flags(params, weight_matrices)
        drawn = iter(choose(fold(key, Stream.CLIENT_SUBSET), sum(matrices), subset.share))
        everybody = jnp.bool_(True)
        chosen = [next(drawn) if matrix else everybody for matrix in matrices]
        chosen = jax.tree.structure(params).unflatten(chosen)

        def of(local, batch, key):
            # The others stay what they were, whatever an optimiser does, and their gradients are
            # exact zeros.
            return loss(jax.tree.map(jnp.where, chosen, local, params), batch, key)

        delta, metrics = make_update(of)(params, batches, num_steps, key, max_steps, round)
        return jax.tree.map(lambda yes, d: jnp.where(yes, d, 0), chosen, delta), metrics

    return update


def deal(params: Any, groups: int) -> list[int | None]:
    """For each variable in order its group; None for all that are no weight matrices.

    The largest matrix goes to the smallest group, then the next.
    """
    selected = zip(jax.tree.leaves(params), flags(params, weight_matrices), strict=True)
    sizes = [int(np.prod(leaf.shape)) if matrix else None for leaf, matrix in selected]
    dealt: list[int | None] = [None] * len(sizes)
    filled = [0] * groups
    matrices = [(-size, i) for i, size in enumerate(sizes) if size is not None]
    for size, i in sorted(matrices):
        group = int(np.argmin(filled))
        dealt[i] = group
        filled[group] -= size
    return dealt
