"""Noise that secure aggregation can carry: integers, drawn by the clients, summed modulo 2^b.

Gaussian noise on the mean presumes a server that may see the exact sum. Under secure aggregation
it sees the sum of what clients send, modulo 2^b, and nothing else; every client then adds a share
of the noise itself (the distributed discrete Gaussian, arXiv 2102.06387; Skellam, arXiv
2110.04995). A client

    clips -> rotates -> scales -> rounds at random -> adds its share -> wraps to b bits

and the server sums modulo 2^b, tops up the shares that are missing, takes the residue nearest to
zero, and undoes scale and rotation. The rotation (signs at random, then a Hadamard matrix) is
public and the same for everybody; it spreads an update evenly over its coordinates, so that few
bits suffice. Rounding lengthens an update; one that got longer than `Encoding.l2` is rounded
again, so that no user moves the sum by more, whatever the float arithmetic before did. A sum that
leaves the range comes back at its other end: that costs accuracy, never privacy.

The noise is Skellam, the difference of two Poisson variables, because sums of it are Skellam
again: with `shares` shares of equal variance the sum has exactly the law that is accounted for.
When fewer clients take part, the server adds the missing shares: the noise then does not depend on
who takes part, as amplification by sampling needs. Against the server itself, which knows the
shares that it added and who sent something, only those of the clients count.

Neither dp_accounting nor jax_privacy has an accountant for it. `skellam.skellam_rdp` is the bound
of arXiv 2110.04995 (corollary 3.6); sampling multiplies it out exactly (`skellam.sampled_rdp`).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedasr.errors import UserError
from fedasr.privacy.rotation import flatness, padded, rotate, unrotate
from fedasr.privacy.skellam_draws import MOST_VARIANCE, draw, skellam_table

MIN_BITS, MAX_BITS = 6, 20
# Updates are scaled to this much below their bound, norms of integers compared with this much less
# than theirs: sums of squares of 2^24 float32 in three levels of 256 err by less than 4.6e-5.
_SCALE_MARGIN, _NORM_MARGIN = 1e-4, 5e-5
# beta of arXiv 2102.06387: roundings longer than the bound have at most this probability each.
_LOG_BETA = -0.5
_ATTEMPTS = 32  # then towards zero: that lengthens nothing, and happens once in e^16 at most
_BLOCK_RATIO = 4
_ROUNDING, _NOISE = 0, 1  # streams of a client's key


@dataclasses.dataclass(frozen=True)
class SecureAggregation:
    """How updates are sent.

    Attributes:
      dimension: parameters that a client sends, at most.
      bits: b; sums are modulo 2^b, and a client sends so many bits per (padded) coordinate.
      deviations: standard deviations of a coordinate of the sum that fit into the range on either
        side of zero. Less wraps more coordinates, more makes rounding coarser.

    Raises:
      UserError: if an argument is out of range.
    """

    dimension: int
    bits: int = 16
    deviations: float = 6.0

    def __post_init__(self):
        if self.dimension != int(self.dimension) or self.dimension < 1:
            raise UserError(f"dimension must be a whole number above 0, not {self.dimension}.")
        if self.bits != int(self.bits) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise UserError(
                f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}, not {self.bits}."
            )
        if not 1 <= self.deviations <= 40:
            raise UserError(f"deviations must lie in [1, 40], not {self.deviations}.")

    @property
    def bytes(self) -> float:
        """Bytes that a client sends in a round."""
        return padded(self.dimension) * self.bits / 8


@dataclasses.dataclass(frozen=True)
class Encoding:
    """From real updates to integers and back; all lengths are in units of the integer grid.

    Attributes:
      dimension: coordinates after padding.
      bits: see `SecureAggregation`.
      scale: what a real update is multiplied by.
      l2, l1: bounds on the norms of a client's rounded update.
      variance: of the whole noise on every coordinate of the sum.
      shares: equal parts that it comes in, one for each slot of a round.
    """

    dimension: int
    bits: int
    scale: float
    l2: float
    l1: float
    variance: float
    shares: int

    @property
    def rounding_variance(self) -> float:
        """Of what rounding adds to a coordinate of the sum, at most."""
        return self.shares / 4

    def wrapped(self, norm: float = 0.0) -> float:
        """Share of the sum's coordinates that are expected to wrap around.

        Args:
          norm: L2 norm of the sum of real updates, spread evenly by the rotation.
        """
        signal = (norm * self.scale) ** 2 / self.dimension
        spread = math.sqrt(self.variance + self.rounding_variance + signal)
        return math.erfc(2 ** (self.bits - 1) / spread / math.sqrt(2))

    @property
    def event(self) -> Any:
        """One participation, without chance: a `fedasr.privacy.events.SkellamDpEvent`."""
        from fedasr.privacy.events import SkellamDpEvent

        return SkellamDpEvent(self.l2, self.l1, self.variance)

    def tail_delta(self, rounds: int, turns: float) -> float:
        """What the end of the noise's tails adds to delta, at most.

        The draws that make up the noise end where their probabilities are below 2^-256, 18.8 of
        their standard deviations out or more. Given the sum, each is expected to have its part of
        it, so that the sum has its law as far as 12 standard deviations times the root of the
        number of the widest draws that it could be made of: there, each still has 6.6 to spare.
        Beyond, only the user may explain what is seen. With Chernoff's bound e^-c for Skellam
        tails, the coordinates' parts add up to at most rounds 2 d e^-c(R) + turns 2 (l1 / l2)
        e^-c(R - l2): e^-c is convex there, and the parts of a user's move add up to l1.

        Args:
          rounds: in which noise is drawn.
          turns: expected number of rounds in which the user takes part, at most.
        """

        def log_tail(t):
            t /= self.variance
            return self.variance * (math.hypot(1.0, t) - 1.0 - t * math.asinh(t))

        reach = 12 * math.sqrt(self.variance * self.shares / self.blocks[-1])
        if rounds == 0:
            return 0.0
        if reach - self.l2 < 3 * math.sqrt(self.variance):
            return 1.0
        logs = [math.log(2 * rounds * self.dimension) + log_tail(reach)]
        if turns > 0:
            logs.append(math.log(2 * turns * self.l1 / self.l2) + log_tail(reach - self.l2))
        return min(1.0, sum(math.exp(min(0.0, value)) for value in logs))

    @property
    def blocks(self) -> list[int]:
        """Numbers of shares that are drawn together where they are missing, from 1 up.

        Tails of the sum are as long as many draws make them, so that a block is at most a quarter
        of all; and its table must not be too large.
        """
        share, found = self.variance / self.shares, [1]
        while (size := found[-1] * _BLOCK_RATIO) * _BLOCK_RATIO <= self.shares:
            if share * size > MOST_VARIANCE:
                break
            found.append(size)
        return found


def make_encoding(
    secure: SecureAggregation, clip_norm: float, noise_multiplier: float, slots: int
) -> Encoding:
    """The finest grid on which the sum's coordinates fit the range with `deviations` to spare.

    Args:
      secure: bits and dimension.
      clip_norm: C, bound on a client's real update.
      noise_multiplier: z, above 0: the whole noise has variance (z C)^2, as a Gaussian's would.
      slots: largest number of clients in a round.

    Raises:
      UserError: without noise, or if the bits do not suffice for so many clients.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise UserError("Noise in shares needs a noise multiplier above 0.")
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise UserError("Noise in shares needs a finite clip_norm.")
    size = padded(secure.dimension)
    reach = 2 ** (secure.bits - 1) / secure.deviations
    # A coordinate of the rotated sum: at most `slots` clip norms, spread over all coordinates.
    flat = flatness(secure.dimension) / size
    signal = slots**2 * min(1.0, flat)
    room = reach**2 - slots / 4
    if room <= 0:
        least = math.ceil(math.log2(secure.deviations * math.sqrt(slots))) + 1
        raise UserError(
            f"{secure.bits} bits are too few for the sum of {slots} clients: at least {least}, or "
            "fewer clients."
        )
    clip = math.sqrt(room / (noise_multiplier**2 + signal))  # the clip norm on the grid
    if (noise_multiplier * clip) ** 2 / slots > MOST_VARIANCE:
        raise UserError(
            f"{secure.bits} bits make shares of noise that are too wide to draw for {slots} "
            f"clients: set privacy.bits to {secure.bits - 1} or fewer."
        )
    l2 = rounded_norm(clip, size)
    return Encoding(
        dimension=size,
        bits=secure.bits,
        scale=clip / clip_norm * (1 - _SCALE_MARGIN),
        l2=l2,
        l1=min(math.sqrt(size) * l2, l2**2),
        variance=(noise_multiplier * clip) ** 2,
        shares=slots,
    )


def rounded_norm(norm: float, dimension: int) -> float:
    """Bound on the L2 norm of a vector after rounding at random (arXiv 2102.06387, theorem 1).

    Args:
      norm: L2 norm before. dimension: number of coordinates.

    Returns:
      The smaller of norm + sqrt(d), which always holds, and the bound that conditional rounding
      enforces: its square is norm^2 + d/4 + sqrt(2 log(1/beta)) (norm + sqrt(d)/2), which one
      attempt keeps with probability at least 1 - beta.
    """
    root = math.sqrt(dimension)
    likely = norm**2 + dimension / 4 + math.sqrt(-2 * _LOG_BETA) * (norm + root / 2)
    return min(norm + root, math.sqrt(likely))


def _squares(x: jax.Array) -> jax.Array:
    """Sum of squares of integers, float32, in levels short enough for `_NORM_MARGIN`."""
    x = jnp.square(x.astype(jnp.float32))
    while x.size > 1:
        x = jnp.sum(jnp.pad(x, (0, -x.size % 256)).reshape(-1, 256), axis=1)
    return x.reshape(())


def round_at_random(x: jax.Array, key: jax.Array, bound: float) -> jax.Array:
    """Rounds every coordinate up or down with its own mean, to a vector no longer than `bound`.

    What is longer is drawn again. That the result may depend on the norm biases it a little (arXiv
    2102.06387, proposition 3); it is at most `bound` for any x of at most that norm.

    Args:
      x: float32 [d], magnitudes below 2^24.
      key: of the client and round, used for nothing else.
      bound: on the L2 norm, see `rounded_norm`.

    Returns:
      int32 [d].
    """
    low = jnp.floor(x)
    rest = x - low
    most = bound**2 * (1 - _NORM_MARGIN)

    def attempt(i):
        up = jax.random.uniform(jax.random.fold_in(key, i), x.shape) < rest
        return (low + up).astype(jnp.int32)

    def again(carry):
        i, rounded = carry
        return (i < _ATTEMPTS) & (_squares(rounded) > most)

    first = (jnp.int32(1), attempt(0))
    _, rounded = jax.lax.while_loop(again, lambda carry: (carry[0] + 1, attempt(carry[0])), first)
    shorter = jnp.trunc(x).astype(jnp.int32)
    rounded = jnp.where(_squares(rounded) > most, shorter, rounded)
    # Only a vector that was too long before it was rounded can still be too long.
    return jnp.where(_squares(rounded) > most, 0, rounded)


def wrap(x: jax.Array, bits: int) -> jax.Array:
    """The residues modulo 2^bits nearest to zero, in [-2^(bits - 1), 2^(bits - 1)): int32."""
    return jnp.left_shift(x.astype(jnp.int32), 32 - bits) >> (32 - bits)


def missing_noise(encoding: Encoding, key: jax.Array, missing: jax.Array) -> jax.Array:
    """The sum of so many shares, int32 [dimension]; `missing`, an int32 scalar, may be traced.

    Shares that are drawn together are a law of their own, so that this takes few draws.
    """
    share = encoding.variance / encoding.shares
    missing = jnp.maximum(jnp.asarray(missing, jnp.int32), 0)
    total = jnp.zeros(encoding.dimension, jnp.int32)
    for level, count in enumerate(encoding.blocks):
        times = missing // count
        if count != encoding.blocks[-1]:
            times %= _BLOCK_RATIO
        table = skellam_table(share * count)
        level_key = jax.random.fold_in(key, level)

        def add(i, total, level_key=level_key, table=table):
            return total + draw(table, jax.random.fold_in(level_key, i), encoding.dimension)

        total = jax.lax.fori_loop(0, times, add, total)
    return total


def flatten(tree: Any) -> jax.Array:
    """All leaves in order, float32 [elements]."""
    return jnp.concatenate([x.reshape(-1).astype(jnp.float32) for x in jax.tree.leaves(tree)])


def unflatten(x: jax.Array, like: Any) -> Any:
    """The inverse of `flatten`: float32, shaped like the tree `like`."""
    leaves, treedef = jax.tree.flatten(like)
    sizes = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
    parts = jnp.split(x, sizes[:-1])
    return jax.tree.unflatten(
        treedef, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


def encode(encoding: Encoding, delta: Any, rotation: jax.Array, key: jax.Array) -> jax.Array:
    """What a client sends.

    Args:
      encoding: of the run.
      delta: clipped update, a pytree of at most `encoding.dimension` elements.
      rotation: key of the round's rotation, public.
      key: of the client and round, used for nothing else.

    Returns:
      int32 [encoding.dimension], in [-2^(bits - 1), 2^(bits - 1)).

    Raises:
      UserError: if the update has more elements than the encoding accounts for.
    """
    x = flatten(delta)
    if padded(x.shape[0]) != encoding.dimension:
        raise UserError(
            f"The noise in shares is accounted for {encoding.dimension} coordinates, but updates "
            f"of {x.shape[0]} have {padded(x.shape[0])}: set the dimension to {x.shape[0]}."
        )
    x = rotate(x, rotation) * np.float32(encoding.scale)
    x = round_at_random(x, jax.random.fold_in(key, _ROUNDING), encoding.l2)
    table = skellam_table(encoding.variance / encoding.shares)
    noise = draw(table, jax.random.fold_in(key, _NOISE), encoding.dimension)
    return wrap(x + noise, encoding.bits)


def decode(encoding: Encoding, total: jax.Array, rotation: jax.Array, like: Any) -> Any:
    """The noisy sum of real updates: float32, shaped like `like`.

    Args:
      encoding: of the run.
      total: int32 [encoding.dimension], the sum of what clients sent and of the missing shares,
        modulo 2^bits or modulo 2^32.
      rotation: key of the round's rotation.
      like: a pytree of arrays or shapes.
    """
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(like))
    x = wrap(total, encoding.bits).astype(jnp.float32) / np.float32(encoding.scale)
    return unflatten(unrotate(x, rotation, size), like)


class ShareState(NamedTuple):
    """count: int32 scalar, rounds so far."""

    # Hides `tuple.count`; saved states name it.
    count: jax.Array  # type: ignore[assignment]


def decode_sum(
    encoding: Encoding, expected_cohort: float, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """The server's part: from the sum of what clients sent to the noised mean.

    Args:
      encoding: of the run.
      expected_cohort: what the sum is divided by.
      key: for the missing shares of all rounds, used for nothing else.

    Returns:
      A transformation with state `ShareState` whose `update` takes int32 [encoding.dimension],
      the sum over the clients modulo 2^32, the parameters (for their shapes), `clients`, an int32
      scalar, of how many clients that is the sum, and `rotation`, the key of the round's rotation.
    """

    def init(params):
        del params
        return ShareState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, clients, rotation, **extra):
        del extra
        missing = encoding.shares - clients
        updates += missing_noise(encoding, jax.random.fold_in(key, state.count), missing)
        total = decode(encoding, updates, rotation, params)
        mean = jax.tree.map(lambda x: x / np.float32(expected_cohort), total)
        return mean, ShareState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)
