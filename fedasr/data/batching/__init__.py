"""From users to device-ready chunks: local batches, padded lengths, layouts, prefetch.

Everything here is a pure function of (seed, round, user), so that a resumed run sees the same data.
A user's arrays are padded along axis 0 to the shape of a *bucket*; one bucket and one number of
steps make one compiled program.
"""

from fedasr.data.batching.arrays import write_example
from fedasr.data.batching.buckets import (
    Grid,
    best_boundaries,
    bucket_padding,
    fewest_buckets,
    fitting_bucket,
    make_buckets,
    round_up,
    rounded_slots,
)
from fedasr.data.batching.by_user import UserBatcher
from fedasr.data.batching.clients import ClientBatcher
from fedasr.data.batching.group import Batching
from fedasr.data.batching.parts import part_shapes
from fedasr.data.batching.plan import LocalBatches, pack, pack_sorted
from fedasr.data.batching.pooled import PooledBatcher, eval_batches, pooled_buckets
from fedasr.data.batching.prefetch import Prefetcher
from fedasr.data.batching.resident import make_resident
from fedasr.data.batching.types import Bucket, Chunk, Padding, Resident, Shape, Store

__all__ = [
    "Batching",
    "Bucket",
    "Chunk",
    "ClientBatcher",
    "Grid",
    "LocalBatches",
    "Padding",
    "PooledBatcher",
    "Prefetcher",
    "Resident",
    "Shape",
    "Store",
    "UserBatcher",
    "best_boundaries",
    "bucket_padding",
    "eval_batches",
    "fewest_buckets",
    "fitting_bucket",
    "make_buckets",
    "make_resident",
    "pack",
    "pack_sorted",
    "part_shapes",
    "pooled_buckets",
    "round_up",
    "rounded_slots",
    "write_example",
]
