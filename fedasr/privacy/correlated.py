"""Noise that is correlated over rounds, so that later rounds take back part of earlier ones.

With z_1, z_2, ... fresh Gaussian noise, round t adds the t-th row of C^-1 z instead of z_t, where C
is a lower-triangular "strategy" matrix (DP-FTRL by matrix factorisation; arXiv 2506.08201 is a
survey). What the rounds release is then C x + z up to post-processing by C^-1, x being the clipped
sums: a Gaussian mechanism whose sensitivity is that of C x to one user's participations. Here C is
Toeplitz with non-negative, non-increasing coefficients, from jax-privacy's factorisations of the
prefix sum, that is of the running model under SGD with a constant rate.
"""

import dataclasses
import functools
import math
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fedasr.errors import UserError


@runtime_checkable
class Correlation(Protocol):
    """A strategy matrix C, Toeplitz and lower-triangular.

    Attributes:
      description: in words, for reports.
      bands: number of non-zero diagonals, None if all of them are.
      rounds: length of the training that it is made for.
      buffers: arrays shaped like the parameters, float32, that the noise's state holds.
    """

    @property
    def description(self) -> str: ...

    @property
    def bands(self) -> int | None: ...

    @property
    def rounds(self) -> int: ...

    @property
    def buffers(self) -> int: ...

    def coefficients(self, rounds: int) -> np.ndarray:
        """First column of C for so many rounds, float64 [rounds], non-increasing, >= 0."""
        ...

    def inverse(self) -> Any:
        """C^-1 as a `jax_privacy.matrix_factorization.streaming_matrix.StreamingMatrix`."""
        ...


@dataclasses.dataclass(frozen=True)
class BandedNoise:
    """BandMF with Toeplitz bands, optimised for the mean squared error of the prefix sums.

    See arXiv 2306.08153. The noise's state is bands - 1 copies of the parameters.

    Attributes:
      bands: b; noise of a round takes back parts of the b - 1 rounds before it. 1: independent.
      rounds: length of the training that it is optimised for.

    Raises:
      UserError: if an argument is out of range.
    """

    bands: int
    rounds: int

    def __post_init__(self):
        if not 1 <= self.bands <= self.rounds:
            raise UserError(
                f"bands={self.bands} must lie between 1 and the number of rounds, {self.rounds}"
            )

    @property
    def description(self) -> str:
        return f"banded, {self.bands} bands"

    @property
    def buffers(self) -> int:
        return self.bands - 1

    def coefficients(self, rounds: int) -> np.ndarray:
        """See `Correlation`; norm 1."""
        found = np.asarray(_banded(self.rounds, self.bands), np.float64)[:rounds]
        return np.pad(found, (0, rounds - len(found)))

    def inverse(self) -> Any:
        """See `Correlation`."""
        import jax.numpy as jnp
        from jax_privacy.matrix_factorization import toeplitz

        coefficients = jnp.asarray(_banded(self.rounds, self.bands), jnp.float32)
        return toeplitz.inverse_as_streaming_matrix(coefficients)


@dataclasses.dataclass(frozen=True)
class BufferedNoise:
    """Buffered linear Toeplitz noise (BLT, arXiv 2404.16706), optimised for separated turns.

    Few buffers do the work of many bands: C's coefficients are a sum of so many decaying
    exponentials. See arXiv 2408.08868 for the multiple participations of federated learning.

    Attributes:
      buffers: number of exponentials, 1 to 10; the noise's state is so many copies of the
        parameters.
      rounds: length of the training that it is optimised for.
      separation, participations: of one user, that it is optimised for (any others are accounted
        for as well).

    Raises:
      UserError: if an argument is out of range.
    """

    buffers: int
    rounds: int
    separation: int
    participations: int

    def __post_init__(self):
        if not 1 <= self.buffers <= 10:
            raise UserError(f"buffers={self.buffers} must lie between 1 and 10")
        if min(self.rounds, self.separation, self.participations) < 1:
            raise UserError("rounds, separation and participations must be 1 or more")

    @property
    def description(self) -> str:
        return f"buffered linear Toeplitz, {self.buffers} buffers"

    @property
    def bands(self) -> None:
        return None

    def coefficients(self, rounds: int) -> np.ndarray:
        """See `Correlation`; begins with 1."""
        decay, scale = self._parameters()
        powers = decay[None, :] ** np.arange(rounds - 1)[:, None]
        return np.concatenate([[1.0], powers @ scale])[:rounds]

    def inverse(self) -> Any:
        """See `Correlation`."""
        from jax_privacy.matrix_factorization import buffered_toeplitz

        decay, scale = self._parameters()
        return buffered_toeplitz.StreamingMatrixBuilder(
            buf_decay=decay.astype(np.float32), output_scale=scale.astype(np.float32)
        ).build_inverse()

    def _parameters(self) -> tuple[np.ndarray, np.ndarray]:
        return _buffered(self.buffers, self.rounds, self.separation, self.participations)


@functools.lru_cache
def _banded(rounds: int, bands: int) -> tuple[float, ...]:
    import jax
    from jax_privacy.matrix_factorization import toeplitz

    with jax.ensure_compile_time_eval():  # whoever asks first may be tracing a program
        found = np.asarray(toeplitz.optimize_banded_toeplitz(rounds, bands), np.float32)
    # Float32 from here on: what is accounted for is what runs.
    return tuple(map(float, found))


@functools.lru_cache
def _buffered(
    buffers: int, rounds: int, separation: int, participations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decay and output scale of each buffer, float64 with float32 values, both [buffers]."""
    import jax
    from jax_privacy.matrix_factorization import buffered_toeplitz

    with jax.ensure_compile_time_eval():
        found = buffered_toeplitz.optimize(
            n=rounds,
            min_sep=separation,
            max_participations=participations,
            error="mean",  # as for bands
            min_buffers=buffers,
            max_buffers=buffers,
        )
    decay, scale = (np.asarray(x, np.float32) for x in (found.buf_decay, found.output_scale))
    return decay.astype(np.float64), scale.astype(np.float64)


def sensitivity(
    correlation: Correlation, rounds: int, separation: int, participations: int
) -> float:
    """Norm of what one user can change in C x, in units of the clip norm.

    Non-negative and non-increasing coefficients make the worst case the earliest: as many turns as
    there are, exactly `separation` apart, all pointing the same way (arXiv 2405.13763, Theorem 2).

    Args:
      correlation: C.
      rounds: of the training.
      separation: least number of rounds between a user's turns.
      participations: most turns of a user.

    Raises:
      UserError: if the coefficients are negative or increase, so that the theorem does not hold.
    """
    coefficients = correlation.coefficients(rounds)
    if np.any(coefficients < 0) or np.any(np.diff(coefficients) > 0):
        raise UserError(
            f"{correlation.description}: the coefficients for {rounds} rounds are negative or "
            "increase, their sensitivity is not known; choose fewer bands or buffers"
        )
    turns = min(participations, -(-rounds // separation))
    column = np.zeros(rounds)
    for turn in range(turns):
        start = turn * separation
        column[start:] += coefficients[: rounds - start]
    return math.sqrt(float(column @ column))
