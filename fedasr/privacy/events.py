"""Privacy events that dp_accounting has none of, as its own kind; `accounting` knows their cost."""

import attrs
import numpy as np
from dp_accounting import dp_event

from fedasr.privacy.skellam import sampled_rdp, skellam_rdp


@attrs.frozen(slots=True)
class SkellamDpEvent(dp_event.DpEvent):
    """Symmetric Skellam noise on an integer vector, of users that chance may choose.

    Attributes:
      l2, l1: how far one user moves the vector. variance: of the noise on every coordinate.
      sampling_probability: of a user's part in it, independently of the others.
      dataset_size, truncated_batch_size: where rounds have room for so many users only, both; else
        None.
    """

    l2: float
    l1: float
    variance: float
    sampling_probability: float = 1.0
    dataset_size: int | None = None
    truncated_batch_size: int | None = None

    def untruncated(self, moved: float = 1.0) -> "SkellamDpEvent":
        """With room for everybody, for a user who moves the vector `moved` times as far."""
        return attrs.evolve(
            self,
            l2=self.l2 * moved,
            l1=self.l1 * moved,
            dataset_size=None,
            truncated_batch_size=None,
        )

    def rdp(self, orders: np.ndarray) -> np.ndarray:
        """Rényi bound at orders above 1, the room in a round left aside.

        For zero-out and for add-or-remove neighbours: the noise does not depend on the cohort.
        """

        def curve(order):
            return skellam_rdp(order, self.l2, self.l1, self.variance)

        return sampled_rdp(orders, self.sampling_probability, curve)
