"""What a round reports."""

import dataclasses
from typing import Any

import jax
import numpy as np

from fedasr.data.batching import Padding
from fedasr.federated.cohort import CohortSum
from fedasr.federated.participation import Turnout


@dataclasses.dataclass(frozen=True)
class RoundMetrics:
    """What a round reports.

    round: counted from 1. loss: mean over valid clients of their mean training loss. clients,
    steps, invalid: clients that took part, their optimiser steps, clients whose update was not
    finite. norms, clipped: [layers], mean update norm before clipping, share of clients clipped.
    aux: sums of the loss's scalars. padding: see `Padding`. seconds: wall time of the round;
    waiting: its part spent waiting for data. turnout: of simulated devices, where there are any.
    """

    round: int
    loss: float
    clients: int
    steps: int
    invalid: int
    norms: np.ndarray
    clipped: np.ndarray
    clip_scales: np.ndarray
    aux: dict[str, Any]
    padding: Padding
    seconds: float
    waiting: float
    turnout: Turnout | None = None


def round_metrics(
    round: int,
    total: CohortSum | None,
    scales: np.ndarray,
    padding: Padding,
    seconds: float,
    waiting: float,
    turnout: Turnout | None = None,
) -> RoundMetrics:
    """The metrics of a round.

    Args:
      round: counted from 1. total: the cohort's sum, None for an empty round.
      scales: float32 [layers] of adaptive bounds, or [0].
      padding, seconds, waiting, turnout: of the round.
    """
    if total is None:
        empty = np.zeros(0, np.float32)
        return RoundMetrics(
            *(round, float("nan"), 0, 0, 0, empty, empty, scales, {}, padding),
            *(seconds, waiting, turnout),
        )
    host = jax.device_get(total._replace(delta=None))
    valid = max(int(host.clients - host.invalid), 1)
    return RoundMetrics(
        round=round,
        loss=float(host.loss) / valid if host.clients > host.invalid else float("nan"),
        clients=int(host.clients),
        steps=int(host.steps),
        invalid=int(host.invalid),
        norms=host.norms / valid,
        clipped=host.clipped / valid,
        clip_scales=scales,
        aux=jax.tree.map(lambda x: x.item(), host.aux),
        padding=padding,
        seconds=seconds,
        waiting=waiting,
        turnout=turnout,
    )
