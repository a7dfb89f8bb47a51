"""The registry of everything random in a run: which stream a draw belongs to, and from what root.

Two draws may agree only if they are the same draw of the same run. A run has a root of 256 bits
that follows from its identity (configuration, data, the parameters it starts from; see
`fedasr.federated.simulation.Simulation`), or from the operating system where it has to be secret.
Every use folds its own tag of `Stream` into the root before any counter (round, user, leaf), so
that no use meets another. Tags are at least 2**31 and counters are below: neither can a counter
that is folded into a key be taken for a tag.
"""

import enum
import hashlib
import secrets
from typing import Any

import numpy as np

ROOT_WORDS = 8  # uint32: 256 bits


class Stream(enum.IntEnum):
    """Tags, one for each use. A new use gets a new tag; a tag is never given to another use."""

    # Of the root that follows from a seed alone: what is public, or seen before there is a run.
    INIT = 0x9D1A_0001  # initial parameters
    SEED_TRAINING = 0x9D1A_0002  # central training before the rounds: order, dropout
    CENTRAL = 0x9D1A_0003  # the central baseline
    RESHUFFLE = 0x9D1A_0004  # the IID control deals utterances out anew
    SUBSET = 0x9D1A_0005  # which variables a round trains
    CALIBRATION = 0x9D1A_0006  # recalibration on a new recording day
    DAYS = 0x9D1A_0007  # central training over recording days
    CORRECTIONS = 0x9D1A_0008  # simulated corrections of users
    FUSION = 0x9D1A_0009  # fusion of groups' models between rounds
    STUDY = 0x9D1A_000B  # stages of a study that are not a run
    CANARIES = 0x9D1A_000A  # an audit's made-up recordings
    ADDED = 0x9D1A_000C  # of the key of initial parameters: what an adaptation adds to them
    BOOTSTRAP = 0x9D1A_000D  # which users an interval draws again
    ATTACK = 0x9D1A_000E  # an attack's targets, shadow models and guesses
    DEVICES = 0x9D1A_000F  # speeds of users' devices, and who drops out of which round
    FINE_TUNING = 0x9D1A_0010  # of users' own models before they are evaluated
    CODES = 0x9D1A_0011  # random projection and codebook of masked prediction
    # Of a run's root.
    NOISE = 0x9D1A_0101  # on the sum of updates
    VOTES = 0x9D1A_0102  # on the votes that adapt the clipping
    SAMPLING = 0x9D1A_0103  # who takes part
    TURNS = 0x9D1A_0104  # the fixed order of users: groups, turns
    CLIENTS = 0x9D1A_0105  # clients' local training: dropout, augmentation, rounding
    EXAMPLES = 0x9D1A_0106  # the order of a client's examples
    HISTOGRAM = 0x9D1A_0107  # noise on histograms over users
    COINS = 0x9D1A_0108  # an audit's canaries
    ANALYTICS = 0x9D1A_0109  # noise on what is asked of all users beside training
    # Folded into a client's key of a round, whose other children are its steps.
    WEIGHT = 0x9D1A_0201  # of what decides the client's weight
    CLIENT_SUBSET = 0x9D1A_0202  # the variables that this client trains
    ROUNDED = 0x9D1A_0203  # the variables that are compressed for this client
    SHARE = 0x9D1A_0204  # the client's share of the noise under secure aggregation
    ROTATION = 0x9D1A_0205  # public rotation before secure aggregation
    PERSONAL = 0x9D1A_0207  # training of the client's own model beside the common one
    # Folded into the key of a step, whose other children are its utterances, or its parts.
    BATCH = 0x9D1A_0206  # of what all of a batch share, such as which blocks are dropped


def make_root(*parts: str | int | bytes) -> np.ndarray:
    """A root that only the same parts in the same order give (SHA-256).

    Args:
      parts: what identifies a run, such as a seed and names.

    Returns:
      uint32 [8].
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str | bytes):
            kind, data = type(part).__name__, part.encode() if isinstance(part, str) else part
        else:
            kind, data = "int", str(int(part)).encode()
        digest.update(f"{kind}:{len(data)}:".encode() + data)
    return np.frombuffer(digest.digest(), "<u4").astype(np.uint32)


def secret_root() -> np.ndarray:
    """A root from the operating system's generator, uint32 [8], that nobody can compute again."""
    return np.frombuffer(secrets.token_bytes(4 * ROOT_WORDS), "<u4").astype(np.uint32)


def public_name(root: Any) -> str:
    """16 hexadecimal digits that name a run and from which its root cannot be computed."""
    words = np.asarray(root, np.uint32)
    return hashlib.sha256(b"public name" + words.astype("<u4").tobytes()).hexdigest()[:16]


def key(root: Any, stream: Stream) -> Any:
    """The JAX key of a stream; fold counters into it.

    All 256 bits are hashed in, but a threefry key holds 64 of them.

    Args:
      root: uint32 [8], a numpy array or (within jit) a JAX array.
      stream: whose.
    """
    import jax
    import jax.numpy as jnp

    words = jnp.asarray(root, jnp.uint32)
    found = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
    for i in range(2, ROOT_WORDS):
        found = jax.random.fold_in(found, words[i])
    return jax.random.fold_in(found, np.uint32(stream))


def seed_key(seed: int, stream: Stream) -> Any:
    """The JAX key of a stream that follows from a seed alone, such as that of initialisation."""
    return key(make_root("seed", seed), stream)


def fold(key: Any, stream: Stream) -> Any:
    """The child of a client's key for one of its uses that are not steps."""
    import jax

    return jax.random.fold_in(key, np.uint32(stream))


def generator(stream: Stream, *parts: str | int | bytes) -> np.random.Generator:
    """A numpy generator of a stream; equal parts give equal draws.

    Args:
      stream: whose.
      parts: the root (its bytes, or a seed) and counters.
    """
    words = make_root(int(stream), *parts)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([int(w) for w in words])))


def sub_seed(root: Any, stream: Stream, *parts: str | int | bytes) -> int:
    """A whole number below 2**128 for what takes seeds, such as samplers; `parts` tell uses apart.

    Args:
      root: uint32 [8], not traced.
      stream: whose.
    """
    words = np.asarray(root, np.uint32).astype("<u4").tobytes()
    return int.from_bytes(make_root(words, int(stream), *parts).tobytes()[:16], "little")
