"""What a model's users have been charged so far, over all the runs that led to it.

A checkpoint carries the entries of every run behind its parameters: what was released (the
`dp_accounting` event of the rounds done), about which users. A run that starts from it composes:
users whom two runs share are charged for both, and where it is not known whom they share, all are.

The entries name users by hashes of their ids, which whoever has a list of ids can recognise: a
ledger is for those who train, and is not part of what is released.
"""

import base64
import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedasr.errors import UserError
from fedasr.privacy import accounting

_MOST_HASHES = 200_000  # users named one by one in a checkpoint, 11 bytes each


@dataclasses.dataclass(frozen=True)
class Users:
    """Whom an entry is about.

    Attributes:
      count: how many.
      digest: equal for equal sets of ids.
      hashes: uint64, sorted, of their ids; None where there are too many to keep.
    """

    count: int
    digest: str
    hashes: np.ndarray | None

    @classmethod
    def of(cls, ids: Iterable[str]) -> "Users":
        """The users with these ids."""
        found = [hashlib.sha256(str(name).encode()).digest()[:8] for name in ids]
        hashes = np.sort(np.frombuffer(b"".join(found), "<u8").astype(np.uint64))
        digest = hashlib.sha256(hashes.astype("<u8").tobytes()).hexdigest()[:16]
        return cls(len(hashes), digest, hashes if len(hashes) <= _MOST_HASHES else None)

    def members(self, hashes: np.ndarray) -> np.ndarray | None:
        """Which of the users with these hashes are among them, bool; None if unknown."""
        return None if self.hashes is None else np.isin(hashes, self.hashes)


UNKNOWN_USERS = Users(0, "", None)  # taken to be whoever would be charged most


@dataclasses.dataclass(frozen=True)
class Entry:
    """What one run has released.

    Attributes:
      run: its public name (`fedasr.streams.public_name`), or what else it is known by.
      stage: "rounds", "central" or "seed".
      rounds: done so far (steps, for the other stages).
      event: the `dp_accounting.DpEvent` of all of them, for one user.
      relation: name of the `dp_accounting.NeighboringRelation` that it holds under.
      sampling: in words.
      users: whom it is about.
      deployed: ((cohort, population), event, name of the relation) of each deployment that the run
        stands for.
    """

    run: str
    stage: str
    rounds: int
    event: Any
    relation: str
    sampling: str
    users: Users
    deployed: tuple[tuple[tuple[float, int], Any, str], ...] = ()


def without_privacy(run: str, stage: str, steps: int, users: Users) -> Entry:
    """The entry of training without noise."""
    import dp_accounting

    event = dp_accounting.NonPrivateDpEvent() if steps else dp_accounting.NoOpDpEvent()
    return Entry(run, stage, steps, event, "REPLACE_SPECIAL", "no noise", users)


def of_mechanism(
    run: str,
    mechanism: Any,
    rounds: int,
    users: Users,
    deployments: Sequence[tuple[float, int]] = (),
) -> Entry:
    """The entry of so many rounds of a `fedasr.privacy.mechanism.Mechanism`."""
    deployed = []
    for cohort, population in deployments:
        other = mechanism.deployed(cohort, population)
        relation = other.sampler.neighboring_relation.name
        deployed.append(((cohort, population), other.event(rounds), relation))
    return Entry(
        run,
        "rounds",
        rounds,
        mechanism.event(rounds),
        mechanism.sampler.neighboring_relation.name,
        mechanism.description,
        users,
        tuple(deployed),
    )


# ------------------------------------------------------------------------------------ as data


def event_to_data(event: Any) -> dict[str, Any]:
    """JSON values from which `event_from_data` makes an equal `dp_accounting.DpEvent`."""
    import attrs
    import dp_accounting

    def value(x):
        if isinstance(x, dp_accounting.DpEvent):
            return event_to_data(x)
        if isinstance(x, list | tuple):
            return [value(y) for y in x]
        if isinstance(x, float | np.floating) and not math.isfinite(x):
            raise UserError(f"an event with the number {x} cannot be written down: {event}")
        return x.item() if isinstance(x, np.generic) else x

    fields = {field.name: value(getattr(event, field.name)) for field in attrs.fields(type(event))}
    return {"type": type(event).__name__, **fields}


def event_from_data(data: Mapping[str, Any]) -> Any:
    """See `event_to_data`.

    Raises:
      UserError: no such event is known.
    """
    from dp_accounting import dp_event

    from fedasr.privacy import events

    def value(x):
        if isinstance(x, Mapping):
            return event_from_data(x)
        return [value(y) for y in x] if isinstance(x, list) else x

    name = str(data.get("type"))
    kind = getattr(dp_event, name, getattr(events, name, None))
    if not (isinstance(kind, type) and issubclass(kind, dp_event.DpEvent)):
        raise UserError(f"the ledger has an event that is not known here: {name!r}")
    try:
        return kind(**{name: value(x) for name, x in data.items() if name != "type"})
    except TypeError as error:
        raise UserError(f"the ledger's event cannot be read: {error}") from error


def to_data(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """JSON values for a checkpoint's metadata."""

    def users(one: Users) -> dict[str, Any]:
        hashes = None
        if one.hashes is not None:
            hashes = base64.b64encode(one.hashes.astype("<u8").tobytes()).decode()
        return {"count": one.count, "digest": one.digest, "hashes": hashes}

    return [
        {
            "run": entry.run,
            "stage": entry.stage,
            "rounds": entry.rounds,
            "event": event_to_data(entry.event),
            "relation": entry.relation,
            "sampling": entry.sampling,
            "users": users(entry.users),
            "deployed": [
                {"cohort": case[0], "population": case[1], "event": event_to_data(event)}
                | {"relation": relation}
                for case, event, relation in entry.deployed
            ],
        }
        for entry in entries
    ]


def from_data(data: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """See `to_data`.

    Raises:
      UserError: something is missing or unknown.
    """

    def users(one: Mapping[str, Any]) -> Users:
        hashes = one["hashes"]
        if hashes is not None:
            hashes = np.frombuffer(base64.b64decode(hashes), "<u8").astype(np.uint64)
        return Users(int(one["count"]), one["digest"], hashes)

    try:
        return [
            Entry(
                entry["run"],
                entry["stage"],
                int(entry["rounds"]),
                event_from_data(entry["event"]),
                entry["relation"],
                entry["sampling"],
                users(entry["users"]),
                tuple(
                    (
                        (case["cohort"], case["population"]),
                        event_from_data(case["event"]),
                        case["relation"],
                    )
                    for case in entry["deployed"]
                ),
            )
            for entry in data
        ]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint's ledger cannot be read: {error!r}") from error


# ------------------------------------------------------------------------------------- totals


@dataclasses.dataclass(frozen=True)
class Total:
    """What one user is charged at most, over all runs.

    Attributes:
      epsilon: at `delta`; `math.inf` where a run of theirs had no noise; None where it cannot be
        known.
      delta: as asked for.
      accountant: "PLD", "RDP", or "sum" where events of different neighbours were added up.
      shared: so many of the latest run's users were in an earlier one, as far as that is known.
      assumed: names of the runs whose users are not known one by one, so that all were assumed to
        be shared.
    """

    epsilon: float | None
    delta: float
    accountant: str
    shared: int
    assumed: tuple[str, ...]


def _charged_together(latest: Entry, earlier: Sequence[Entry]) -> tuple[list[tuple[int, ...]], int]:
    """Which earlier entries share a user of the latest one: the largest sets; and how many users.

    An entry whose users are not known one by one is taken to share all of them.
    """
    everyone = tuple(range(len(earlier)))
    if not earlier or latest.users.hashes is None:
        return [everyone], latest.users.count if earlier else 0
    masks = []
    for entry in earlier:
        found = entry.users.members(latest.users.hashes)
        masks.append(np.ones(latest.users.count, bool) if found is None else found)
    by_user = np.stack(masks, axis=1)
    patterns = {tuple(np.flatnonzero(row).tolist()) for row in np.unique(by_user, axis=0)}
    largest = [p for p in patterns if not any(set(p) < set(q) for q in patterns)]
    return largest, int(by_user.any(axis=1).sum())


def composed(parts: Sequence[tuple[Any, str]], delta: float) -> tuple[float, str]:
    """Epsilon of events about the same user, and by which accountant.

    Events under one relation are composed by `accounting.epsilon`. A guarantee for replacing a
    user by any other holds for replacing the user by one who sends nothing, too, so that mixtures
    may be added up: each gets an equal share of delta, and the epsilons are summed.

    Args:
      parts: (event, name of its relation).
      delta: in (0, 1).
    """
    import dp_accounting

    by_relation: dict[str, list[Any]] = {}
    for event, relation in parts:
        by_relation.setdefault(relation, []).append(event)
    if not by_relation:
        return 0.0, "PLD"
    found = [
        accounting.epsilon(
            dp_accounting.ComposedDpEvent(events),
            delta / len(by_relation),
            dp_accounting.NeighboringRelation[relation],
        )
        for relation, events in by_relation.items()
    ]
    if len(found) == 1:
        return found[0].epsilon, found[0].accountant
    return sum(one.epsilon for one in found), "sum"


def total(entries: Sequence[Entry], delta: float) -> Total:
    """What the users of the latest entry are charged, worst user.

    Args:
      entries: of all runs, the latest last; at least one.
      delta: in (0, 1).
    """
    *earlier, latest = entries
    sets, shared = _charged_together(latest, earlier)
    figures = [
        composed([(e.event, e.relation) for e in (*(earlier[i] for i in chosen), latest)], delta)
        for chosen in sets
    ]
    epsilon, accountant = max(figures)
    known = latest.users.hashes is not None
    assumed = {e.run for e in earlier if e.users.hashes is None or not known}
    return Total(epsilon, delta, accountant, shared, tuple(sorted(assumed)))


def total_deployed(entries: Sequence[Entry], case: tuple[float, int], delta: float) -> float | None:
    """Epsilon over all runs of a deployment (cohort, population) that stands for each of them.

    Users whom simulated runs share are shared in the deployment, all of them.

    Returns:
      None where a run that shares users does not say what it is in this deployment.
    """
    *earlier, latest = entries
    sets, _ = _charged_together(latest, earlier)
    involved = [earlier[i] for i in sorted({i for chosen in sets for i in chosen})]
    parts = []
    for entry in (*involved, latest):
        said = {tuple(where): (event, relation) for where, event, relation in entry.deployed}
        if tuple(case) not in said:
            return None
        parts.append(said[tuple(case)])
    return composed(parts, delta)[0]


def _untruncated(event: Any) -> tuple[Any, float]:
    """Ordinary Poisson rounds in place of truncated ones, and the probability that they differ."""
    from dp_accounting import dp_event

    if isinstance(event, dp_event.SelfComposedDpEvent):
        one, mass = _untruncated(event.event)
        return dp_event.SelfComposedDpEvent(one, event.count), mass * event.count
    if isinstance(event, dp_event.ComposedDpEvent):
        found = [_untruncated(child) for child in event.events]
        return dp_event.ComposedDpEvent([e for e, _ in found]), sum(m for _, m in found)
    if isinstance(event, dp_event.TruncatedSubsampledGaussianDpEvent):
        plain = dp_event.GaussianDpEvent(event.noise_multiplier)
        full = accounting.full_round_probability(event)
        return dp_event.PoissonSampledDpEvent(event.sampling_probability, plain), full
    return event, 0.0


def search_cost(entries: Sequence[Entry], delta: float) -> dict[str, Any]:
    """What a search over runs costs the users whom they share.

    Args:
      entries: the last of each run that was tried, all about the same users or unknown ones.
      delta: in (0, 1).

    Returns:
      "runs"; "epsilon", "accountant": of all runs composed, which holds for whatever is chosen or
      published of them; "repeat_and_select": epsilon of publishing the best alone, had the number
      of runs been drawn from a Poisson distribution with this mean (arXiv 2110.03620), None where
      the runs' events differ or have no Rényi bound.
    """
    import dp_accounting
    from dp_accounting import dp_event, rdp

    if not entries:
        return {"runs": 0, "epsilon": 0.0, "accountant": "PLD", "repeat_and_select": None}
    epsilon, accountant = composed([(e.event, e.relation) for e in entries], delta)
    selected = None
    first = entries[0]
    if all((e.event, e.relation) == (first.event, first.relation) for e in entries):
        one, mass = _untruncated(first.event)
        event = dp_event.RepeatAndSelectDpEvent(one, len(entries), math.inf)
        account = rdp.RdpAccountant(
            neighboring_relation=dp_accounting.NeighboringRelation[first.relation]
        )
        if mass * len(entries) < 1e-3 * delta and account.supports(event):
            selected = float(account.compose(event).get_epsilon(delta))
    return {
        "runs": len(entries),
        "epsilon": epsilon,
        "accountant": accountant,
        "repeat_and_select": selected,
    }


def in_words(described: Mapping[str, Any]) -> list[str]:
    """Lines for people from a summary's "ledger"; none for a model with one run behind it.

    Args:
      described: with infinities as numbers (`fedasr.training.logging.from_json`).
    """
    if not described.get("known", True):
        return [
            "privacy over all runs: unknown, the model that this run started from has no ledger"
        ]
    earlier = described.get("earlier") or []
    if not earlier:
        return []
    assumed = (
        " (assumed where their users are not known)" if (described["users_assumed_shared"]) else ""
    )
    total = accounting.epsilon_in_words(described["total_epsilon"])
    lines = [
        f"privacy over this run and {len(earlier)} before it: epsilon {total} at delta "
        f"{described['delta']:g} ({described['accountant']}), for the {described['shared_users']} "
        f"users who were in an earlier one{assumed}"
    ]
    for case in described["total_deployed"]:
        lines.append(
            f"the same as deployed with {case['cohort']:,} of {case['population']:,} users a round "
            f"in all of them: epsilon {accounting.epsilon_in_words(case['epsilon'])}"
        )
    return lines
