"""The one object that states the privacy of a run.

From a `Mechanism` come the client's clipping, the server's noise, and the event that dp_accounting
turns into an epsilon: what is claimed is what is run.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedasr.data.sampling import PoissonSampler, Sampler
from fedasr.errors import UserError
from fedasr.privacy import accounting, clipping


class NoiseState(NamedTuple):
    """Number of updates noised so far: an int32 scalar, which is all that a resume needs."""

    count: chex.Array


def add_gaussian_noise(std: float, key: chex.PRNGKey) -> optax.GradientTransformation:
    """Adds N(0, std^2) to every element, once per update, fresh for every update.

    The noise of update t on leaf i has key fold_in(fold_in(key, t), i): it depends on nothing but
    the key and the state, so a run resumed from a saved state draws what it would have drawn. It
    is drawn and added in float32.

    Args:
      std: standard deviation; 0 adds nothing.
      key: a JAX random key, used for nothing else.

    Returns:
      A transformation whose state is `NoiseState`.
    """
    if not (math.isfinite(std) and std >= 0):
        raise UserError(f"The noise's standard deviation must be finite and >= 0, not {std}.")

    def init(params):
        del params
        return NoiseState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        if std > 0:
            round_key = jax.random.fold_in(key, state.count)
            leaves, treedef = jax.tree.flatten(updates)
            noisy = [
                leaf.astype(jnp.float32)
                + std * jax.random.normal(jax.random.fold_in(round_key, i), leaf.shape, jnp.float32)
                for i, leaf in enumerate(leaves)
            ]
            updates = treedef.unflatten(
                [new.astype(old.dtype) for new, old in zip(noisy, leaves, strict=True)]
            )
        return updates, NoiseState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """Subsampled Gaussian mechanism on clipped client updates (user-level DP, arXiv 2310.00098).

    Attributes:
      clip_norm: C, bound on the L2 norm of a client's update; `math.inf` for no clipping.
      budget: "global" for one clip of the whole update, or how C is shared among layers: "uniform",
        "dim" or a callable (see `clipping.layer_bounds`).
      noise_multiplier: z, standard deviation of the noise on the SUM of updates over C.
      sampler: who takes part.
      layers: None for one layer per array, or a function from path to layer name.
      normalise: with a per-layer budget, rescale as the paper's public code does (see
        `clipping.clip_layers`).
      weighting: "uniform", or "examples" to weigh users by their number of examples; the mean is
        then over the realised weights, which is possible without noise only.

    Raises:
      UserError: if an argument is out of range, or noise is asked for without a clip norm or with
        weights (it could not be scaled to what one user can change).
    """

    clip_norm: float
    budget: clipping.Budget
    noise_multiplier: float
    sampler: Sampler
    layers: clipping.Layers = None
    normalise: bool = False
    weighting: str = "uniform"

    def __post_init__(self):
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise UserError(
                f"noise_multiplier must be finite and 0 or more, not {self.noise_multiplier}."
            )
        if self.clip_norm == math.inf and self.noise_multiplier > 0:
            raise UserError("Noise needs a finite clip_norm; set one, or noise_multiplier to 0.")
        if self.weighting not in ("uniform", "examples"):
            raise UserError(f"weighting must be 'uniform' or 'examples', not {self.weighting!r}.")
        if self.weighting == "examples" and self.noise_multiplier > 0:
            raise UserError(
                "Weighting users by their examples has no bounded sensitivity: set weighting to "
                "'uniform', or noise_multiplier to 0."
            )
        if self.normalise and (self.budget == "global" or self.clip_norm == math.inf):
            raise UserError("normalise needs a per-layer budget and a finite clip_norm.")
        self.client_transform()  # raises for an unusable clip_norm or budget

    @property
    def sigma(self) -> float:
        """The paper's sigma_DP = z / expected cohort: std of the noise on the mean over C."""
        return self.noise_multiplier / self.sampler.expected_cohort

    @property
    def noise_std(self) -> float:
        """Standard deviation C * sigma_DP of the noise on every element of the mean."""
        return self.clip_norm * self.sigma if self.noise_multiplier else 0.0

    def client_transform(self) -> optax.GradientTransformation:
        """Clipping of one client's update, with state `clipping.ClipState`."""
        if self.clip_norm == math.inf:
            return clipping.no_clip(layers=self.layers)
        if self.budget == "global":
            return clipping.clip_global(self.clip_norm, layers=self.layers)
        return clipping.clip_by_layer(
            self.clip_norm, self.budget, layers=self.layers, normalise=self.normalise
        )

    def server_transform(self, key: chex.PRNGKey) -> optax.GradientTransformation:
        """From the SUM of clipped updates to the noised mean.

        The sum is divided by the EXPECTED cohort size: dividing by the realised one would make the
        sensitivity depend on who takes part. Noise of std C * sigma_DP follows, exactly once.

        Args:
          key: a JAX random key for the noise of the whole run, used for nothing else.
        """
        return optax.chain(
            optax.scale(1 / self.sampler.expected_cohort),
            add_gaussian_noise(self.noise_std, key),
        )

    def event(self, rounds: int) -> Any:
        """The `dp_accounting.DpEvent` of the whole run."""
        return accounting.compose(self.sampler.event(self.noise_multiplier), rounds)

    def epsilon(self, rounds: int, delta: float) -> accounting.Epsilon:
        """Epsilon of the whole run at `delta` (see `accounting.epsilon`)."""
        return accounting.epsilon(
            self.event(rounds),
            delta,
            self.sampler.neighboring_relation,
            self.sampler.description,
        )

    def deployed(self, cohort: float, population: int) -> "Mechanism":
        """The deployment that a small simulation stands for: same sigma_DP and clip, larger cohort.

        The mean of `cohort` clients gets the noise that the simulation's mean got, so that training
        goes alike, while the noise multiplier grows to sigma_DP * cohort. Sampling is Poisson with
        the default number of slots, whose truncation is part of the event.

        Args:
          cohort: expected number of users per round.
          population: number of users.
        """
        return dataclasses.replace(
            self,
            noise_multiplier=self.sigma * cohort,
            sampler=PoissonSampler(population, cohort, seed=0),
        )
