"""What a federated algorithm is, and those that there are.

A new one is a file in this folder and a line in `ALGORITHMS`. See `Algorithm` for its parts.
"""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import optax

from fedasr.errors import UserError
from fedasr.federated.client import ClientUpdate
from fedasr.federated.cohort import Weigh
from fedasr.federated.extras import Extras, MemoryLayout
from fedasr.federated.local import LocalStore
from fedasr.federated.participation import Participation
from fedasr.federated.subset import select

# name: "module:function or class", called as
# make(client_update, server_optimizer, *, trained=None, store=None), see `Algorithm`. What else it
# takes by keyword are its options, or what a run knows (`Facts`). A function `memory(variables)` of
# the same module says what its users remember (`fedasr.federated.extras`), and one
# `personal(params, memory, trained)` which model of their own that is. These names are what the
# setting `algorithm` may be, beside "central".
ALGORITHMS = {
    "federated": "fedasr.federated.algorithms.fedavg:FedAvg",
    "ditto": "fedasr.federated.algorithms.ditto:Ditto",
    "fedbuff": "fedasr.federated.algorithms.fedbuff:FedBuff",
    "feddyn": "fedasr.federated.algorithms.feddyn:FedDyn",
    "fedexp": "fedasr.federated.algorithms.fedexp:FedExP",
    "fednova": "fedasr.federated.algorithms.fednova:FedNova",
    "fedrep": "fedasr.federated.algorithms.fedrep:FedRep",
    "fomaml": "fedasr.federated.algorithms.fomaml:FOMAML",
    "mime": "fedasr.federated.algorithms.mime:Mime",
    "mimelite": "fedasr.federated.algorithms.mimelite:MimeLite",
    "pfedme": "fedasr.federated.algorithms.pfedme:pFedMe",
    "reptile": "fedasr.federated.algorithms.reptile:Reptile",
    "scaffold": "fedasr.federated.algorithms.scaffold:Scaffold",
}


@runtime_checkable
class Algorithm(Protocol):
    """What clients do with the parameters they get, and the server with what they send.

    The mechanism stands between the two, whatever the algorithm: all that clients send is one
    update (a tree), which is clipped, weighted, summed and noised. So an algorithm needs no
    argument about privacy of its own, and where its state lives says what is said about users:

    * What the server sends beside the model, and clients answer (SCAFFOLD's control variate), and
      what clients remember that is no variable of the model, is said by an attribute `extras`, a
      `fedasr.federated.extras.Extras`, which an algorithm without them need not have. (They may
      also be variables of the parameters that `Simulation.init` is given.)
    * Which of the users drawn get an update back, and when, is said by an attribute
      `participation`, a `fedasr.federated.participation.Participation`; without it all do, at once.
    * What the server alone remembers (momenta, buffered updates) is the optimiser's state.
    * What a client alone remembers between rounds is local variables of the parameters: a row of
      the store. Never sent, nor seen by anybody else.
    """

    @property
    def client_update(self) -> ClientUpdate:
        """Local training, from the parameters to a delta (old minus new) of what is trained."""

    @property
    def server_optimizer(self) -> optax.GradientTransformation:
        """The server's step: any optax transformation; it sees the noisy mean of clients' deltas.

        Its state is part of checkpoints.
        """

    @property
    def trained(self) -> Sequence[bool] | None:
        """For each variable in order, whether `client_update` trains it; None for all.

        Its deltas then hold these variables only (see `fedasr.federated.subset`). The rest get no
        clipping bound, no noise and no optimiser state, and stay as they are.
        """

    @property
    def store(self) -> LocalStore | None:
        """The users' local parameters, which `client_update` trains with the rest; None for none.

        Its layout must know `trained`, and its round be the state's: `store.restore` makes it so.
        """

    @property
    def weights(self) -> Sequence[float] | np.ndarray | None:
        """Of the users, in [0, 1], [users], for a mechanism whose weighting is "bounded".

        A user's own may depend on their data and on what is public or private by itself (such as a
        noisy histogram), not otherwise on another user's data. The server divides by the expected
        cohort all the same, so that small weights are small steps.
        """

    @property
    def weigh(self) -> Weigh | None:
        """Weights that devices decide in every round, likewise; both given, they multiply."""


def sent(algorithm: Algorithm) -> Sequence[bool] | None:
    """For each variable in order, whether clients send an update of it; None for all."""
    return algorithm.trained if algorithm.store is None else algorithm.store.layout.shared


def extras_of(algorithm: Algorithm) -> Extras | None:
    """What an algorithm exchanges beside the model; None for nothing."""
    return getattr(algorithm, "extras", None)


def participation_of(algorithm: Algorithm) -> Participation | None:
    """The simulated devices of the users; None where all take part at once."""
    return getattr(algorithm, "participation", None)


def sent_like(algorithm: Algorithm, params: Any) -> Any:
    """Like what a client sends: the variables that it sends an update of, and more.

    Args:
      params: the server's, or their shapes.
    """
    part, extras = select(params, sent(algorithm)), extras_of(algorithm)
    return part if extras is None else extras.sent_like(part)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a run tells an algorithm that has a keyword of the same name.

    Attributes:
      share: expected cohort over the population.
      unit: about how far a client goes for a gradient of 1: its learning rate times its steps. What
        is sent in these units is of the size of a delta, with which it shares the clip norm.
    """

    share: float
    unit: float


def make_algorithm(
    name: str,
    client_update: ClientUpdate,
    server_optimizer: optax.GradientTransformation,
    facts: Facts,
    options: Mapping[str, Any],
    **given: Any,
) -> Algorithm:
    """An algorithm with its options.

    Args:
      name: in `ALGORITHMS`. client_update, server_optimizer: of the run.
      facts: of the run. options: by name, numbers. given: `trained` and `store`.

    Raises:
      UserError: for an unknown name or option, or a value that the algorithm does not take.
    """
    make = algorithm_by_name(name)
    known = option_names(name)
    if unknown := sorted(set(options) - set(known)):
        raise UserError(
            f"algorithm_options has {unknown[0]!r}, which {name!r} does not take: it takes "
            f"{', '.join(known) or 'none'}"
        )
    told = {
        field.name: getattr(facts, field.name)
        for field in dataclasses.fields(facts)
        if field.name in inspect.signature(make).parameters
    }
    return make(client_update, server_optimizer, **given, **{**told, **options})


def option_names(name: str) -> list[str]:
    """What an algorithm takes by keyword beside what every one does."""
    parameters = inspect.signature(algorithm_by_name(name)).parameters.values()
    common = ("trained", "store", "weights", "weigh", "extras", "participation")
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in common]


def memory_layout(
    name: str, params: Any, trained: Sequence[bool] | None = None
) -> MemoryLayout | None:
    """How what an algorithm's users remember lies in a store; None where they remember nothing.

    Args:
      name: in `ALGORITHMS`. params: the model's, or their shapes.
      trained: for each variable in order, whether clients train it; None for all.
    """
    memory = part_of_module(name, "memory")
    if memory is None:
        return None
    personal = part_of_module(name, "personal")
    own = None if personal is None else functools.partial(personal, trained=trained)
    return MemoryLayout(params, memory, trained, own)


def part_of_module(name: str, part: str) -> Any:
    """A function of an algorithm's module, such as `memory` or `personal`; None without one."""
    return getattr(importlib.import_module(_home(name)[0]), part, None)


def algorithm_by_name(name: str) -> Callable[..., Algorithm]:
    """What makes an algorithm of `ALGORITHMS`.

    Raises:
      UserError: for an unknown name.
    """
    module, attribute = _home(name)
    return getattr(importlib.import_module(module), attribute)


def _home(name: str) -> list[str]:
    if name not in ALGORITHMS:
        raise UserError(f"unknown algorithm {name!r}: choose one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name].split(":")
