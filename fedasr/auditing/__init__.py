"""Auditing: what an attacker finds out about users in spite of the noise, as a bound on epsilon.

An accountant proves an upper bound on epsilon for a mechanism on paper. An audit attacks the code
that runs: *canary* users, each present or absent by chance, are guessed from what the server
publishes, and from how well the guesses do follows a *lower* bound on the epsilon of the code. A
lower bound above the claimed epsilon proves that the code is not the mechanism (or bad luck, with
probability 1 - confidence); one below proves nothing.

The attack is a strong one. All other users are known (they contribute zero), every round's noisy
mean is published, and a canary's update is enormous along a direction of its own, so that clipping
brings it to exactly the clip norm: one coordinate of every layer belongs to a canary, which makes
canaries' scores independent and any layer that escapes clipping glaring. Every fifth canary has a
hundred examples, so that weights would show. Sampling, batching, the cohort's sum, clipping,
division and noise are those of `fedasr.federated.simulation.Simulation`.

It is not the strongest: other users could oppose the canary, which matters where a user displaces
another (fixed-size sampling, few slots), and an attacker could know the turns of users in turn and
undo the correlation of noise. Nothing of that makes a bound too high.

An absent canary is a user whose update is zero, which is what Poisson sampling and users in turn
are compared with. (With fewer slots than users the absent one still takes a slot; the claim covers
who takes none, too, of which this audit sees nothing.) Where users are replaced by any other it is
one replacement.

Two ways to bound epsilon, both by jax_privacy:

* `many_runs`: independent runs with one canary; Clopper-Pearson intervals of the true and false
  positive rates (Nasr et al., 2023, arXiv 2302.07956, section 3). It assumes nothing about the
  mechanism, and needs thousands of runs.
* `one_run`: many canaries with a fair coin each in one run, the highest scores guessed to be
  present (Steinke et al., 2023, arXiv 2305.08846). That bound, `strict`, assumes nothing and is
  loose. The one reported takes the trade-off curve to be that of a Gaussian mechanism (Mahloujifar
  et al., 2024, arXiv 2410.22235). That is exact without sampling; with sampling it is an
  approximation that is wrong where delta comes near the sampling probability q, so delta must be at
  most q / 100 (at q / 250 it never exceeded the claim of correct code in twenty audits). Several
  runs with canaries of their own are one larger run.

jax_privacy's `epsilon_from_gdp` is not used: version 2.0.0 takes the absolute value of a negative
lower bound, and reports an epsilon where there is none.
"""

from fedasr.auditing.attacks import audit_updates, observe, statistics
from fedasr.auditing.bounds import METHODS, Audit, Scores, conclude, guess_count
from fedasr.auditing.canaries import (
    CanaryCorpus,
    canary_params,
    crafted_update,
    default_canaries,
    for_canaries,
    layer_weights,
    publish,
    toss,
)
from fedasr.auditing.plot import write_roc

__all__ = [
    "METHODS",
    "Audit",
    "CanaryCorpus",
    "Scores",
    "audit_updates",
    "canary_params",
    "conclude",
    "crafted_update",
    "default_canaries",
    "for_canaries",
    "guess_count",
    "layer_weights",
    "observe",
    "publish",
    "statistics",
    "toss",
    "write_roc",
]
