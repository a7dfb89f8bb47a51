"""What turns an encoder into a transducer (RNN-T): a prediction network and a joint network.

The prediction network is stateless: it sees the last labels and has no recurrence (Ghodsi et al.,
"RNN-transducer with stateless prediction network", ICASSP 2020). All label positions of an
utterance are then computed at once, and the state of decoding is those labels. The joint network
adds both projections, takes the tanh and scores every token (Graves et al., 2013, arXiv 1303.5778).
"""

import os
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedasr.errors import UserError
from fedasr.generators import DrawingConfig
from fedasr.kernels.ctc import BLANK
from fedasr.models import layers

OBJECTIVES = ("best_rq", "ctc", "rnnt")


@dataclass(frozen=True)
class ObjectiveConfig(DrawingConfig):
    """What an encoder is trained for.

    objective: "ctc", the encoder scores every token in every frame; "rnnt", its output layer
    projects to `joint_dim` and a `Transducer` scores; or "best_rq", without transcripts, it scores
    the codes of hidden frames (`fedasr.models.best_rq`). generator: see `fedasr.generators`.

    Of "rnnt" alone: context, labels that the prediction network looks back on; prediction_dim,
    joint_dim, its hidden units, and the joint network's; ctc_weight, share of the loss that is CTC
    on the encoder's output, by a layer of its own, the rest is RNN-T; max_symbols, labels that
    greedy decoding may write in one encoder frame.

    Of "best_rq" alone: mask_start, probability that a hidden span begins at an encoder frame;
    mask_span, encoder frames of a span; codes, how many there are; code_dim, numbers of a code.
    """

    objective: str = "ctc"
    context: int = 2
    prediction_dim: int = 128
    joint_dim: int = 128
    ctc_weight: float = 0.0
    max_symbols: int = 8
    mask_start: float = 0.04
    mask_span: int = 10
    codes: int = 256
    code_dim: int = 16

    def outputs(self, vocab: int) -> int:
        """Units of the encoder's output layer."""
        return {"best_rq": self.codes, "rnnt": self.joint_dim}.get(self.objective, vocab)

    def check_objective(self) -> None:
        """Raises UserError for an unknown objective, a size below 1 or a share out of range."""
        if self.objective not in OBJECTIVES:
            raise UserError(
                f"the model's objective must be one of {OBJECTIVES}: {self.objective!r}"
            )
        layers.check_sizes(self, ("context", "prediction_dim", "joint_dim", "max_symbols"))
        layers.check_sizes(self, ("mask_span", "codes", "code_dim"))
        if not 0 < self.mask_start < 1:
            raise UserError(f"the model's mask_start must be in (0, 1): {self.mask_start}")
        if not 0 <= self.ctc_weight < 1:
            raise UserError(f"the model's ctc_weight must be in [0, 1): {self.ctc_weight}")


def check_joint(batch: int, frames: int, positions: int, vocab: int) -> None:
    """Raises UserError where the joint network's scores, and the loss of them, would not fit.

    Args:
      batch, frames, positions, vocab: the sizes of the lattice: utterances, encoder frames, labels
        and one, tokens.
    """
    size, there = 4 * batch * frames * positions * vocab, _memory()
    if 2 * size > there:  # in float32, and what the loss makes of it
        raise UserError(
            f"the RNN-T joint network would take {size / 2**30:.1f} GiB ({batch} utterances x "
            f"{frames} frames x {positions} label positions x {vocab} tokens) and its loss as much "
            f"again, {there / 2**30:.1f} GiB are there: take smaller batches (client.micro_batch), "
            "shorter recordings (max_seconds) or fewer tokens, or objective='ctc'"
        )


def _memory() -> int:
    """Bytes of the first device, or of the machine where it does not tell (a CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return 1 << 62


class Transducer(nn.Module):
    """Encoder outputs and labels to scores of what comes next.

    config: an `ObjectiveConfig` with `vocab` and `dtype`.
    """

    config: Any

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        init = layers.uniform_fan_in()
        # As a dense layer on one-hot labels: the gradient is a product, not a scatter. Each row is
        # a label's embedding, whatever the number of labels.
        self.embedding = layers.Dense(
            c.prediction_dim, kernel_init=nn.initializers.normal(c.context**-0.5), dtype=dtype
        )
        self.prediction = layers.Dense(c.joint_dim, use_bias=False, kernel_init=init, dtype=dtype)
        self.output = layers.Dense(c.vocab, kernel_init=init, dtype=dtype)
        if c.ctc_weight:
            self.ctc = layers.Dense(c.vocab, kernel_init=init, dtype=dtype)

    def predict(self, last: jax.Array) -> jax.Array:
        """The prediction network: last labels int [..., context] -> [..., joint_dim]."""
        labels = jax.nn.one_hot(last, self.config.vocab, dtype=jnp.dtype(self.config.dtype))
        hidden = self.embedding(labels.reshape(*last.shape[:-1], -1))
        return self.prediction(jnp.tanh(hidden))

    def join(self, encoded: jax.Array, predicted: jax.Array) -> jax.Array:
        """The joint network: [..., joint_dim] twice, which broadcast -> scores [..., vocab]."""
        dtype = jnp.dtype(self.config.dtype)
        return self.output(jnp.tanh(encoded.astype(dtype) + predicted))

    def score(self, frame: jax.Array, last: jax.Array) -> jax.Array:
        """Scores for greedy decoding: [b, joint_dim] and int [b, context] -> [b, vocab]."""
        return self.join(frame, self.predict(last))

    def ctc_scores(self, encoded: jax.Array) -> jax.Array:
        """Scores of every token in every frame: [b, t, joint_dim] -> [b, t, vocab]."""
        return self.ctc(encoded)

    def __call__(self, encoded: jax.Array, labels: jax.Array) -> jax.Array:
        """Scores of the whole lattice.

        Args:
          encoded: [b, t, joint_dim]. labels: int [b, u], padded with anything.

        Returns:
          [b, t, u + 1, vocab] in the compute's dtype.
        """
        context, positions = self.config.context, labels.shape[1] + 1
        check_joint(encoded.shape[0], encoded.shape[1], positions, self.config.vocab)
        before = jnp.pad(labels, ((0, 0), (context, 0)), constant_values=BLANK)
        last = jnp.stack([before[:, i : i + positions] for i in range(context)], axis=-1)
        if self.is_initializing() and self.config.ctc_weight:
            self.ctc(encoded)
        return self.join(encoded[:, :, None], self.predict(last)[:, None])
