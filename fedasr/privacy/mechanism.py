"""The one object that states the privacy of a run.

From a `Mechanism` come the client's clipping, the server's noise, and the event that dp_accounting
turns into an epsilon: what is claimed is what is run.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np
import optax

from fedasr.errors import UserError
from fedasr.privacy import accounting, clipping, noise
from fedasr.privacy.adaptive import AdaptiveClip, adapt_scales, clip_scaled
from fedasr.privacy.correlated import Correlation, sensitivity
from fedasr.privacy.gaussian import add_gaussian_noise
from fedasr.privacy.sampling import Sampler
from fedasr.privacy.secure_aggregation import (
    Encoding,
    SecureAggregation,
    decode_sum,
    encode,
    make_encoding,
)

# Of the claimed delta, so much may be lost where the tails of the noise end.
_TAIL_SHARE = 0.01
_NEVER = 1e-15  # a probability that no number of rounds makes visible
_MOST_PARAMETERS = 10**10  # on which the loss at the tails hardly depends


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
      weighting: "uniform"; "bounded" for clipped updates times weights in [0, 1] of the users' own
        (see `fedasr.federated.algorithms.Algorithm`), which leave the sensitivity and the
        division as they are; or "examples" to weigh users by their number of examples: the mean is
        then over the realised weights, which is possible without noise only.
      correlation: None for fresh noise every round, or how the rounds' noise hangs together; the
        noise multiplier is then that of the fresh noise it is made from.
      adaptive: None for fixed bounds, or how they follow the updates' norms (`clip_norm` and
        `budget` are then where they begin).
      released: noise multipliers of what was published about all the users before the first round,
        such as histograms that weights are made from (`fedasr.feedback.weighting`): Gaussian
        queries, the standard deviation over what one user's contribution changes. They are part
        of `event`.
      secure: None for Gaussian noise that the server adds, or how clients send integers with shares
        of Skellam noise in them, for secure aggregation: noise of the same variance.

    Raises:
      UserError: if an argument is out of range, noise is asked for without a clip norm or with
        weights (it could not be scaled to what one user can change), or no accountant knows the
        combination of sampler and correlation.
    """

    clip_norm: float
    budget: clipping.Budget
    noise_multiplier: float
    sampler: Sampler
    layers: clipping.Layers = None
    normalise: bool = False
    weighting: str = "uniform"
    correlation: Correlation | None = None
    adaptive: AdaptiveClip | None = None
    released: tuple[float, ...] = ()
    secure: SecureAggregation | None = None

    def __post_init__(self):
        self._check_noise()
        self._check_clipping()
        self._check_correlation()
        self._check_secure()
        self.client_transform()  # raises for an unusable clip_norm or budget

    def _check_noise(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise UserError(
                f"noise_multiplier must be finite and 0 or more, not {self.noise_multiplier}."
            )
        if self.clip_norm == math.inf and self.noise_multiplier > 0:
            raise UserError("Noise needs a finite clip_norm; set one, or noise_multiplier to 0.")
        if self.weighting not in ("uniform", "bounded", "examples"):
            raise UserError(
                f"weighting must be 'uniform', 'bounded' or 'examples', not {self.weighting!r}."
            )
        if self.weighting == "examples" and self.noise_multiplier > 0:
            raise UserError(
                "Weighting users by their examples has no bounded sensitivity: set weighting to "
                "'uniform' or 'bounded', or noise_multiplier to 0."
            )
        if not all(z >= 0 for z in self.released):
            raise UserError(f"released noise multipliers must be 0 or more: {self.released}.")

    def _check_clipping(self) -> None:
        if self.normalise and (self.budget == "global" or self.clip_norm == math.inf):
            raise UserError("normalise needs a per-layer budget and a finite clip_norm.")
        if self.adaptive is not None and (self.normalise or self.clip_norm == math.inf):
            raise UserError("Adaptive clipping needs a finite clip_norm, and not normalise.")
        if (
            self.adaptive is not None
            and self.noise_multiplier
            and not (self.adaptive.noise_multiplier)
        ):
            raise UserError("The counts that adapt the clipping need noise of their own.")

    def _check_correlation(self) -> None:
        """Amplification by sampling is known for bands no wider than the users' separation."""
        correlation, sampler = self.correlation, self.sampler
        if correlation is None or not sampler.amplifies:
            return
        nearest = "take users in turn, without amplification (ShuffledSampler, 'shuffled')"
        if correlation.bands is None:
            raise UserError(
                f"No accountant knows {correlation.description} noise under {sampler.description} "
                f"sampling: {nearest}, or use banded noise with cyclic Poisson sampling."
            )
        if correlation.bands > sampler.separation:
            raise UserError(
                f"{correlation.description} noise needs users at least {correlation.bands} rounds "
                f"apart, {sampler.description} sampling has them {sampler.separation} apart: use "
                f"Poisson sampling with cycle={correlation.bands}, or {nearest}."
            )

    def _check_secure(self) -> None:
        """Shares of Skellam noise are accounted for as fresh noise on sums of fixed sensitivity."""
        if self.secure is None:
            return
        if self.correlation is not None:
            raise UserError(
                f"No accountant knows {self.correlation.description} noise in shares: use Skellam "
                "noise that is independent from round to round, or correlated Gaussian noise."
            )
        if self.adaptive is not None:
            raise UserError(
                "Skellam noise is on a grid of fixed bounds: set privacy.adaptive.enabled=False, "
                "or privacy.noise='independent'."
            )
        if self.sampler.sensitivity != 1:
            raise UserError(
                f"No accountant knows Skellam noise under {self.sampler.description}: use Poisson "
                "sampling ('poisson'), or users in turn ('shuffled')."
            )
        _ = self.encoding  # raises where bits or noise do not suffice

    @property
    def encoding(self) -> Encoding:
        """How clients send updates, where `secure` is given."""
        assert self.secure is not None
        return make_encoding(self.secure, self.clip_norm, self.noise_multiplier, self.sampler.slots)

    def central(self) -> "Mechanism":
        """The same with Gaussian noise of the same variance, added by a server that is trusted."""
        return dataclasses.replace(self, secure=None)

    def encoder(self) -> Callable[..., jax.Array] | None:
        """From a clipped and weighted update to what its client sends; None without `secure`.

        See `secure_aggregation.encode`, without its first argument.
        """
        return None if self.secure is None else functools.partial(encode, self.encoding)

    def check_weights(self, weights: Any, users: int) -> np.ndarray | None:
        """Weights of the users that leave a user's sensitivity at the clip norm.

        Args:
          weights: [users], or None for none.
          users: how many there are.

        Returns:
          float32 [users], each in [0, 1]; None for None.

        Raises:
          UserError: the mechanism's weighting is not "bounded", or a weight is not in [0, 1].
        """
        if weights is None:
            return None
        if self.weighting != "bounded":
            raise UserError("Weights of users need a mechanism with weighting='bounded'.")
        weights = np.asarray(weights, np.float32)
        if weights.shape != (users,):
            raise UserError(f"There are {users} users, but weights of shape {weights.shape}.")
        if not ((weights >= 0) & (weights <= 1)).all():
            raise UserError(
                "Weights must lie in [0, 1]: above 1 a user could move the sum by more "
                "than the clip norm."
            )
        return weights

    def check_local(self, prototype: str) -> None:
        """Refuses local parameters of users through which one user could reach another.

        Args:
          prototype: what a new user starts from, see `fedasr.federated.local.LocalStore`.

        Raises:
          UserError: there is noise to account for, and new users get a part of others' local
            parameters, which nothing bounds; or rounds have so few slots that users displace each
            other: who trains would then depend on who else is there, and local parameters remember
            it beyond the round whose noise hides it.
        """
        if not self.noise_multiplier:
            return
        if prototype != "init":
            raise UserError(
                f"local.prototype={prototype!r} gives users a part of each other's local "
                "parameters, which nothing bounds: with privacy it must be 'init'"
            )
        if self.sampler.overflow_probability > _NEVER:
            raise UserError(
                f"{self.sampler.slots} slots drop users from a round with probability "
                f"{self.sampler.overflow_probability:.2g}, and local parameters remember who was "
                "displaced: leave privacy.slots at 0, or take sampler 'fixed' or 'shuffled'"
            )

    @property
    def sigma(self) -> float:
        """The paper's sigma_DP = z / expected cohort: std of the noise on the mean over C."""
        return self.noise_multiplier / self.sampler.expected_cohort

    @property
    def noise_over_sensitivity(self) -> float:
        """Standard deviation of the noise on the sum over how far one user can move the sum."""
        return self.noise_multiplier / self.sampler.sensitivity

    @property
    def noise_std(self) -> float:
        """Standard deviation C * sigma_DP of the noise on every element of the mean."""
        return self.clip_norm * self.sigma if self.noise_multiplier else 0.0

    @property
    def description(self) -> str:
        """Sampling, and noise where it is correlated, in words."""
        if self.secure is not None:
            return f"{self.sampler.description}; Skellam noise in {self.secure.bits} bits"
        if self.correlation is None:
            return self.sampler.description
        return f"{self.sampler.description}; {self.correlation.description} noise"

    def client_transform(self) -> optax.GradientTransformation:
        """Clipping of one client's update, with state `clipping.ClipState`.

        With adaptive bounds `init` takes an `adaptive.ClientView` and the state has their scales;
        the clipped update is in units of the scales (see `adaptive.clip_scaled`).
        """
        if self.clip_norm == math.inf:
            return clipping.no_clip(layers=self.layers)
        if self.budget == "global":
            clip = clipping.clip_global(self.clip_norm, layers=self.layers)
        else:
            clip = clipping.clip_by_layer(
                self.clip_norm, self.budget, layers=self.layers, normalise=self.normalise
            )
        if self.adaptive is None:
            return clip
        return clip_scaled(clip, self.layers)

    def server_transform(
        self, key: chex.PRNGKey, votes: chex.PRNGKey | None = None
    ) -> optax.GradientTransformation:
        """From the SUM of clipped updates to the noised mean.

        The sum is divided by the EXPECTED cohort size: dividing by the realised one would make the
        sensitivity depend on who takes part. Noise of std C * sigma_DP follows, exactly once.

        Adaptive bounds are moved last, by the extra arguments `clipped` and `clients` of `update`
        (see `adaptive.adapt_scales`).

        Args:
          key: a JAX random key for the noise of the whole run, used for nothing else.
          votes: another one, for the noise on the users' votes, where bounds adapt.

        Raises:
          UserError: bounds adapt and there is no key for the votes.
        """
        if self.secure is not None:
            return decode_sum(self.encoding, self.sampler.expected_cohort, key)
        steps = [
            optax.scale(1 / self.sampler.expected_cohort),
            add_gaussian_noise(
                self.noise_std, key, self.correlation, noise.reach_for(self._shift())
            ),
        ]
        if self.adaptive is not None:
            if votes is None:
                raise UserError("Adaptive clipping needs a key of its own for the votes' noise.")
            steps.append(
                adapt_scales(
                    self.adaptive,
                    self.sampler.expected_cohort,
                    votes,
                    self.layers,
                    shared=self.budget == "global",
                )
            )
        return optax.chain(*steps)

    def _shift(self, rounds: int | None = None) -> float:
        """How far one user moves the fresh noise at most, in its standard deviations.

        In one round, or under correlated noise in all of them together.

        Args:
          rounds: of the training; None for the number that the correlation is made for.
        """
        if not self.noise_multiplier:
            return 0.0
        shift = self.sampler.sensitivity / self.noise_multiplier
        if self.correlation is None:
            return shift
        rounds = self.correlation.rounds if rounds is None else rounds
        turns = self.sampler.participations(rounds)
        return shift * sensitivity(self.correlation, rounds, self.sampler.separation, turns)

    def tail_delta(self, rounds: int, parameters: int = _MOST_PARAMETERS) -> float:
        """What is added to delta because the noise's tails end somewhere (see `noise.tail_delta`).

        Args:
          rounds: of the training.
          parameters: numbers that get noise in a round.

        Returns:
          A probability, rigorously bounded for the worst direction in which a user can move the
          sums; 0 without noise, 1 where the tails do not reach far enough to claim anything.
        """
        if not self.noise_multiplier or rounds == 0:
            return 0.0
        turns = float(self.sampler.participations(rounds))
        if self.sampler.amplifies:
            sampler = self.sampler
            turns *= min(1.0, sampler.expected_cohort * sampler.separation / sampler.population)
        if self.secure is not None:
            return min(1.0, self.encoding.tail_delta(rounds, turns) + self._released_tail())
        floor = self._released_tail()
        if self.adaptive is not None and self.adaptive.noise_multiplier:
            shift = 1 / self.adaptive.noise_multiplier
            reach = noise.reach_for(shift)
            floor += noise.tail_delta(
                shift, reach, rounds=rounds, turns=turns, coordinates=parameters
            )
        noises = rounds
        if self.correlation is not None:  # all rounds are one vector, all turns one shift of it
            noises, turns, parameters = 1, 1.0, parameters * rounds
        reach = noise.reach_for(self._shift())
        floor += noise.tail_delta(
            self._shift(rounds), reach, rounds=noises, turns=turns, coordinates=parameters
        )
        return min(1.0, floor)

    def _released_tail(self) -> float:
        return sum(
            noise.tail_delta(
                self.sampler.sensitivity / z,
                noise.released_reach(z),
                rounds=1,
                turns=1.0,
                coordinates=_MOST_PARAMETERS,
            )
            for z in self.released
            if z
        )

    def check_delta(self, rounds: int, delta: float) -> float:
        """`tail_delta` for up to 10^10 parameters, if that is small beside a claimed delta.

        Raises:
          UserError: it is more than 1% of `delta`.
        """
        floor = self.tail_delta(rounds)
        if floor > _TAIL_SHARE * delta:
            least = floor / _TAIL_SHARE
            other = f"delta to {least:.2g} or more, or " if least < 0.1 else ""
            raise UserError(
                f"delta={delta:g} cannot be claimed: the noise ends, and what lies beyond has a "
                f"probability of up to {floor:.2g}, more than 1% of it. Set {other}more noise "
                "(sigma)."
            )
        return floor

    def event(self, rounds: int) -> Any:
        """The `dp_accounting.DpEvent` of the whole run.

        Counts of clipped users, where they are taken, are answered about the same users as the sum:
        the two are one Gaussian query whose squared sensitivities add up. Correlated noise is
        either a subsampled event for every turn of a user (bands no wider than the separation
        keep the turns apart, arXiv 2306.08153) or, without chance, one Gaussian event for all of
        a user's turns together. What was `released` before is composed with all that.
        """
        event = self._rounds_event(rounds)
        if not self.released:
            return event
        import dp_accounting

        def released(z: float) -> Any:
            # Replacing a user moves a query by no more than removing one and adding another.
            z /= self.sampler.sensitivity
            if z == 0:
                return dp_accounting.NonPrivateDpEvent()
            return dp_accounting.GaussianDpEvent(z)

        return dp_accounting.ComposedDpEvent([event, *map(released, self.released)])

    def _rounds_event(self, rounds: int) -> Any:
        turns = self.sampler.participations(rounds)
        if self.secure is not None:
            return accounting.compose(self._shares_event(), turns)
        sum_noise = self.noise_multiplier
        if self.correlation is not None and rounds > 0 and self.sampler.amplifies:
            sum_noise /= sensitivity(self.correlation, rounds, self.sampler.separation, 1)
        count_noise = math.inf if self.adaptive is None else self.adaptive.noise_multiplier
        if self.correlation is None or self.sampler.amplifies or rounds == 0:
            event = self.sampler.event(_joint(sum_noise, count_noise))
            return accounting.compose(event, turns)
        changed = sensitivity(self.correlation, rounds, self.sampler.separation, turns)
        return self.sampler.event(_joint(sum_noise / changed, count_noise / math.sqrt(turns)))

    def _shares_event(self) -> Any:
        """One round's, with the chance and the room of the sampler's own event."""
        import attrs

        chance = ("sampling_probability", "dataset_size", "truncated_batch_size")
        gaussian = self.sampler.event(self.noise_multiplier)
        said = {name: getattr(gaussian, name) for name in chance if hasattr(gaussian, name)}
        return attrs.evolve(self.encoding.event, **said)

    def calibrated(self, target_epsilon: float, delta: float, rounds: int) -> "Mechanism":
        """The same mechanism with the smallest noise (to 0.1%) whose `epsilon` is at most that.

        Raises:
          UserError: if no noise does.
        """
        noise = accounting.calibrate_noise(
            target_epsilon,
            delta,
            lambda z: dataclasses.replace(self, noise_multiplier=z).event(rounds),
            self.sampler.neighboring_relation,
        )
        return dataclasses.replace(self, noise_multiplier=noise)

    def epsilon(self, rounds: int, delta: float) -> accounting.Epsilon:
        """Epsilon of the whole run at `delta` (see `accounting.epsilon`).

        Raises:
          UserError: the tails of the noise do not reach far enough for `delta`.
        """
        self.check_delta(rounds, delta)
        return accounting.epsilon(
            self.event(rounds),
            delta,
            self.sampler.neighboring_relation,
            self.description,
        )

    def deployed(self, cohort: float, population: int) -> "Mechanism":
        """The deployment that a small simulation stands for: same sigma_DP and clip, larger cohort.

        The mean of `cohort` clients gets the noise that the simulation's mean got, so that training
        goes alike, while the noise multiplier grows to sigma_DP * cohort. See `Sampler.deployed`
        for the sampling. What was `released` about all users has the same noise on its shares of
        them, so that those noise multipliers grow with the population, and with them every
        threshold on a released count (of word histograms, say) that is to mean the same: a word
        that counted from n users on counts there from n * population / this population users on.

        Args:
          cohort: expected number of users per round.
          population: number of users.
        """
        adaptive = self.adaptive
        if adaptive is not None:
            growth = cohort / self.sampler.expected_cohort
            adaptive = dataclasses.replace(
                adaptive, noise_multiplier=adaptive.noise_multiplier * growth
            )
        return dataclasses.replace(
            self,
            noise_multiplier=self.sigma * cohort,
            sampler=self.sampler.deployed(cohort, population),
            adaptive=adaptive,
            released=tuple(z * population / self.sampler.population for z in self.released),
        )


def _joint(*noise_multipliers: float) -> float:
    """The noise multiplier of several Gaussian queries about the same user, answered together."""
    least = min(noise_multipliers)
    if least == 0:
        return 0.0
    return least / math.sqrt(sum((least / z) ** 2 for z in noise_multipliers))
