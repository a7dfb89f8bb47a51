"""Who takes part in a round: stateless samplers that name the privacy event they implement.

A sampler is a frozen description. `cohort(round)` depends on nothing but the seed and the round, so
a resumed run meets the same users, and `event` states the subsampling that was really done, so an
epsilon cannot be claimed for another one. A new one is a file here that fulfils
`fedasr.privacy.sampling.protocol.Sampler`.
"""

from fedasr.privacy.sampling.asynchronous import AsynchronousSampler
from fedasr.privacy.sampling.fixed import FixedSizeSampler
from fedasr.privacy.sampling.poisson import PoissonSampler
from fedasr.privacy.sampling.protocol import Sampler
from fedasr.privacy.sampling.shuffled import ShuffledSampler
from fedasr.privacy.sampling.silent import SilentSampler

__all__ = [
    "AsynchronousSampler",
    "FixedSizeSampler",
    "PoissonSampler",
    "Sampler",
    "ShuffledSampler",
    "SilentSampler",
]
