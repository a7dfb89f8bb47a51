"""What a run adds up over its rounds, and whether it came to anything."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fedasr.federated.metrics import RoundMetrics

# Of client updates: with more invalid ones the rest are no cohort any more.
_MOST_INVALID = 0.5
_BAD_ROUNDS = 3  # so many at the end are no accident


@dataclasses.dataclass
class Totals:
    """What a run adds up over its rounds; part of every checkpoint."""

    wall_seconds: float = 0.0
    invalid_client_updates: int = 0
    infeasible_utterances: int = 0
    real: int = 0
    computed: int = 0
    timed_steps: int = 0
    timed_seconds: float = 0.0
    client_updates: int = 0
    loss_is_finite: bool = True  # in the last round with anybody in it, or the last steps
    # "2 x cpu -> 1 x cpu at 40": where the run went on with sums in another order.
    device_changes: list[str] = dataclasses.field(default_factory=list)
    bad_rounds: int = 0  # in a row, up to the last, in which most updates were invalid

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "Totals":
        """Those of a checkpoint, by whatever release."""
        return cls(
            **{
                field.name: tree[field.name]
                for field in dataclasses.fields(cls)
                if field.name in tree
            }
        )

    def add(self, metrics: RoundMetrics, compiled: bool) -> None:
        """Counts a round; one that compiled something says nothing about speed."""
        self.invalid_client_updates += metrics.invalid
        self.client_updates += metrics.clients
        if metrics.clients:
            self.loss_is_finite = math.isfinite(metrics.loss)
            bad = metrics.invalid > _MOST_INVALID * metrics.clients
            self.bad_rounds = self.bad_rounds + 1 if bad else 0
        self.infeasible_utterances += int(metrics.aux.get("infeasible", 0))
        self.real += metrics.padding.real
        self.computed += metrics.padding.computed
        if not compiled:
            self.timed_steps += metrics.steps
            self.timed_seconds += metrics.seconds

    def problem(self) -> str:
        """Why a run that got to its end has not done what it should; "" if it has."""
        invalid, updates = self.invalid_client_updates, self.client_updates
        if invalid > _MOST_INVALID * updates:
            return f"{invalid} of {updates} client updates were not finite and counted as zero"
        if self.bad_rounds >= _BAD_ROUNDS:
            return (
                f"in the last {self.bad_rounds} rounds most client updates were not finite and "
                "counted as zero"
            )
        return "" if self.loss_is_finite else "the last training loss was not finite"
