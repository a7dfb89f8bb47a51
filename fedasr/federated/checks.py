"""Which parts of a simulation go together: one function a rule, which raises UserError."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from fedasr.data.batching import Batching
from fedasr.data.corpus import Corpus
from fedasr.errors import UserError
from fedasr.federated import hosts
from fedasr.federated.client import takes_correction
from fedasr.federated.extras import MemoryLayout
from fedasr.federated.hardware import Hardware
from fedasr.federated.participation import Participation
from fedasr.federated.server import ByBlock
from fedasr.privacy.mechanism import Mechanism

if TYPE_CHECKING:  # algorithms check themselves by these rules
    from fedasr.federated.algorithms import Algorithm


def check(
    corpus: Corpus,
    mechanism: Mechanism,
    algorithm: Algorithm,
    batching: Batching,
    hardware: Hardware,
) -> None:
    """Raises UserError for the first rule that is broken; each group has checked itself."""
    sampler_and_corpus_agree(mechanism, corpus)
    weights_are_used(mechanism, algorithm)
    weigh_is_bounded(mechanism, algorithm)
    weigh_sees_the_whole_model(algorithm)
    weigh_sees_one_client(algorithm, batching)
    shares_are_whole(mechanism, hardware)
    resident_is_in_one_process(batching)
    store_has_one_writer(algorithm)
    store_and_corpus_agree(algorithm, corpus)
    store_knows_what_is_trained(algorithm)
    store_is_private(mechanism, algorithm)
    extras_fit(mechanism, algorithm)
    extras_are_accounted(mechanism, algorithm)
    staleness_is_known(mechanism, algorithm)


def sampler_and_corpus_agree(mechanism: Mechanism, corpus: Corpus) -> None:
    """The sampler draws from the corpus's users."""
    drawn, users = mechanism.sampler.population, len(corpus.users)
    if drawn != users:
        raise UserError(f"the sampler draws from {drawn} users, the corpus has {users}")


def weights_are_used(mechanism: Mechanism, algorithm: Algorithm) -> None:
    """Weights are not given beside those that a mechanism takes from the corpus."""
    if algorithm.weights is not None and mechanism.weighting == "examples":
        raise UserError(
            "weights need a mechanism with weighting='bounded': this one counts examples"
        )


def weigh_is_bounded(mechanism: Mechanism, algorithm: Algorithm) -> None:
    """Devices decide weights only where the mechanism bounds them."""
    if algorithm.weigh is not None and (mechanism.weighting != "bounded" or mechanism.adaptive):
        raise UserError("weigh needs a mechanism with weighting='bounded', without adaptive")


def weigh_sees_the_whole_model(algorithm: Algorithm) -> None:
    """`weigh` is given the server's parameters, which local ones are missing in."""
    if algorithm.weigh is not None and algorithm.store is not None:
        raise UserError("weigh would judge a model without the user's local parameters")


def weigh_sees_one_client(algorithm: Algorithm, batching: Batching) -> None:
    """`weigh` is given a client's batches, which of a resident corpus hold everybody's examples."""
    if algorithm.weigh is not None and batching.resident is not None:
        raise UserError("weigh would be given the whole of a resident corpus")


def shares_are_whole(mechanism: Mechanism, hardware: Hardware) -> None:
    """Noise in shares needs a client's update on one device."""
    if mechanism.secure is not None and hardware.model_devices > 1:
        raise UserError("noise in shares rotates whole updates: it needs model_devices=1")


def resident_is_in_one_process(batching: Batching) -> None:
    """A resident corpus is put on devices of this process."""
    if batching.resident is not None and jax.process_count() > 1:
        raise UserError("a resident corpus needs all devices in one process")


def store_has_one_writer(algorithm: Algorithm) -> None:
    """Of several processes the first writes the rows, the others read them."""
    store = algorithm.store
    if store is not None and not hosts.is_leader() and not store.read_only:
        raise UserError(
            "of several processes only the first may write local parameters: open the store with "
            "read_only=True in the others"
        )


def store_and_corpus_agree(algorithm: Algorithm, corpus: Corpus) -> None:
    """The store has a place for each of the corpus's users."""
    store, users = algorithm.store, len(corpus.users)
    if store is not None and store.users != users:
        raise UserError(f"the local parameters are of {store.users} users, the corpus has {users}")


def store_knows_what_is_trained(algorithm: Algorithm) -> None:
    """The layout of rows was made for the same trained variables."""
    if algorithm.store is None:
        return
    trained = None if algorithm.trained is None else tuple(algorithm.trained)
    if algorithm.store.layout.trained != trained:
        raise UserError("the layout of the local parameters does not know what is trained")


def store_is_private(mechanism: Mechanism, algorithm: Algorithm) -> None:
    """No user reaches another through local parameters; see `Mechanism.check_local`."""
    if algorithm.store is not None:
        mechanism.check_local(algorithm.store.prototype)


def extras_fit(mechanism: Mechanism, algorithm: Algorithm) -> None:
    """What goes beside the model has its place everywhere that it comes by."""
    extras, store = getattr(algorithm, "extras", None), algorithm.store
    if extras is None:
        return
    if algorithm.weigh is not None:
        raise UserError("weigh would judge an update with an algorithm's own parts in it")
    if mechanism.secure is not None and extras.message is not None:
        raise UserError("noise in shares has room for the model's updates alone")
    if store is not None and not isinstance(store.layout, MemoryLayout):
        raise UserError(
            "this algorithm keeps a memory of its own for each user: unset local.patterns"
        )
    if store is not None and store.prototype != "init":
        raise UserError("what an algorithm remembers of a user begins empty: prototype='init'")


def staleness_is_known(mechanism: Mechanism, algorithm: Algorithm) -> None:
    """Who hands in updates to earlier models is known to the sampler, and they are to be had."""
    extras = getattr(algorithm, "extras", None)
    stale = extras is not None and extras.discount is not None
    if stale and not hasattr(mechanism.sampler, "staleness"):
        raise UserError(
            "updates of any age need a sampler that bounds every user's participations: take "
            "AsynchronousSampler (with algorithm='fedbuff' of a configuration, it is)"
        )
    if not stale and hasattr(mechanism.sampler, "staleness"):
        raise UserError(
            "users who train when they can need an algorithm that takes updates of any age, such "
            "as 'fedbuff'"
        )


def extras_are_accounted(mechanism: Mechanism, algorithm: Algorithm) -> None:
    """An algorithm whose privacy nobody can state is refused where there is noise."""
    extras = getattr(algorithm, "extras", None)
    if extras is not None and extras.unaccounted and mechanism.noise_multiplier:
        raise UserError(extras.unaccounted)


def dropout_is_accounted(
    mechanism: Mechanism, participation: Participation | None, corpus: Corpus
) -> None:
    """Whether a user's update is missing depends on that user, and noise is not missing with it."""
    if participation is None:
        return
    if (known := len(participation.devices.transfer)) != len(corpus.users):
        raise UserError(f"there are devices of {known} users, the corpus has {len(corpus.users)}")
    if hasattr(mechanism.sampler, "staleness"):
        raise UserError(
            "participation is of rounds, which users who train when they can have not: give "
            "AsynchronousSampler the times of their devices"
        )
    if participation.first and mechanism.noise_multiplier:
        raise UserError(
            "participation.first has users displace each other, which no accountant covers: with "
            "privacy ask a larger cohort and set participation.deadline"
        )
    if mechanism.secure is not None:
        raise UserError(
            "noise in shares is missing where users drop out: participation needs noise that the "
            "server adds (privacy.noise='independent')"
        )


def has_memory(store: object, name: str) -> None:
    """An algorithm that remembers its users is given a place for that."""
    if store is None:
        raise UserError(f"{name} remembers its users: give it a store (`MemoryLayout`)")


def takes_corrections(client_update: Callable[..., Any], name: str) -> None:
    """Local training lets the algorithm correct gradients."""
    if not takes_correction(client_update):
        raise UserError(
            f"{name} corrects the gradients of plain local training: unset compression, and choose "
            "partial.mode='all' or 'fixed'"
        )


def may_stack(mechanism: Mechanism, algorithm: Algorithm, hardware: Hardware) -> bool:
    """Whether nothing but the loss and the clipping looks at single parameters."""
    extras = getattr(algorithm, "extras", None)
    looks = (algorithm.trained, algorithm.store, extras, algorithm.weigh)
    plain = all(x is None for x in looks) and mechanism.adaptive is None
    return (
        hardware.stacked_blocks and hardware.model_devices == 1 and plain and not mechanism.secure
    )


def server_may_stack(mechanism: Mechanism, algorithm: Algorithm) -> bool:
    """Whether the server's step treats every array by itself, where `may_stack` holds."""
    return isinstance(algorithm.server_optimizer, ByBlock) and mechanism.correlation is None
