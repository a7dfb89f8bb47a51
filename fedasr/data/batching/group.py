"""All that says how users' examples reach the devices, in one group."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from fedasr.data.batching.buckets import Grid
from fedasr.data.batching.clients import ClientBatcher
from fedasr.data.batching.plan import LocalBatches
from fedasr.data.batching.types import Bucket, Resident
from fedasr.data.corpus import Corpus
from fedasr.errors import UserError


@dataclasses.dataclass(frozen=True)
class Batching(LocalBatches):
    """How clients' examples become batches, and how those are padded, parted and transferred.

    The first five fields are those of `LocalBatches`: one of batch_size and frames, and one of
    steps and epochs; max_steps.

    Attributes:
      buckets: padded lengths, see `ClientBatcher`; None for a `Grid`.
      micro_batch: above 0, batches are computed in parts of at most so many examples.
      select: names of the example arrays that the loss needs; None for all.
      resident: the corpus's examples, from `make_resident`, to put on every device at once: batches
        are then gathered there, and rounds read, pad and transfer nothing but indices. For corpora
        that fit there; None to read users' examples when they take part.

    Raises:
      UserError: for fields that make no sense, see also `LocalBatches`.
    """

    buckets: Sequence[Bucket] | Grid | None = dataclasses.field(default=None, kw_only=True)
    micro_batch: int = dataclasses.field(default=0, kw_only=True)
    select: Sequence[str] | None = dataclasses.field(default=None, kw_only=True)
    resident: Resident | None = dataclasses.field(
        default=None, kw_only=True, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch < 0:
            raise UserError(f"micro_batch must be at least 0 (got {self.micro_batch})")

    def batcher(self, corpus: Corpus, chunk_size: int, seed: int, **more: Any) -> ClientBatcher:
        """The batcher of a corpus; `more` are further arguments of `ClientBatcher`."""
        return ClientBatcher(
            corpus,
            self,
            Grid() if self.buckets is None else self.buckets,
            chunk_size,
            seed,
            select=self.select,
            micro_batch=self.micro_batch,
            resident=self.resident,
            **more,
        )
