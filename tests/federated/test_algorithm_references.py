"""Each federated algorithm against plain NumPy on quadratic problems, and what it reduces to.

User i has n_i points a; a step on a batch with mean a has the gradient SCALES * (y - a) (float32
there, float64 here). Users have 1 to 4 batches, so that numbers of steps differ.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedasr as fa
from fedasr.compression.partial import Subset, partial_training
from fedasr.federated.algorithms import Facts, make_algorithm, memory_layout, option_names
from fedasr.federated.client import take_batch, view_of_client
from fedasr.federated.extras import MemoryLayout
from fedasr.privacy.adaptive import AdaptiveClip

USERS, COHORT, ROUNDS, RATE, SERVER = 6, 3, 20, 0.1, 0.7
SHARE, UNIT = COHORT / USERS, 0.25
RNG = np.random.default_rng(0)
POINTS = [RNG.normal(size=(1 + i % 4, 3)).astype(np.float32) for i in range(USERS)]
CORPUS = fa.InMemoryCorpus({f"u{i}": [{"x": x} for x in own] for i, own in enumerate(POINTS)})
SCALES = np.float32([1.0, 2.0, 0.5])
START = {"w": np.float32([0.5, -0.5, 1.0]), "v": np.zeros(1, np.float32)}
ONE = jax.devices()[:1]


def squares(params, batch, key):
    count = jnp.maximum(batch["mask"].sum(), 1)
    error = 0.5 * jnp.sum((params["w"] - batch["x"]) ** 2 * SCALES, axis=1)
    return jnp.sum(error * batch["mask"]) / count + 0.5 * jnp.sum(params["v"] ** 2), {}


UPDATE = fa.local_training(squares, optax.sgd(RATE), grad_clip=None)
SGD = optax.sgd(SERVER)
EACH = fa.Batching(1, epochs=1)


@dataclasses.dataclass
class Run:
    simulation: fa.Simulation
    store: fa.LocalStore | None
    layout: MemoryLayout | None

    def cohorts(self, state, rounds=ROUNDS):
        """Of each round the users, each with the points of its batches in order."""
        draws = self.simulation.draws(state)
        for round in range(rounds):
            users = draws.sampler.cohort(round)
            yield [(int(u), self._points(u, round, draws.order)) for u in users]

    def _points(self, user, round, order):
        """Of the user, as the round's batches of one hold them."""
        for chunk, _ in self.simulation.batcher.chunks(np.array([user]), round, order):
            row = int(np.flatnonzero(chunk.num_steps > 0)[0])
            steps = range(int(chunk.num_steps[row]))
            own = view_of_client(chunk.batches, row)
            return np.array([take_batch(own, step)["x"][0] for step in steps])

    def memory(self):
        rows = self.store.gather(range(USERS), self.layout.extract(START))
        return [self.layout.unpack(row) for row in rows]


def make(name, folder=None, *, noise=0.0, clip=np.inf, sampler=None, hardware=None, update=UPDATE,
         server=SGD, trained=None, budget="global", corpus=CORPUS, batching=EACH, share=SHARE,
         adaptive=None, **options):  # fmt: skip
    layout = memory_layout(name, START, trained)
    store = None if layout is None else fa.LocalStore(folder, layout, USERS)
    facts = Facts(share=share, unit=UNIT)
    algorithm = make_algorithm(name, update, server, facts, options, trained=trained, store=store)
    sampler = sampler or fa.FixedSizeSampler(USERS, COHORT, seed=0)
    simulation = fa.Simulation(
        corpus,
        fa.Mechanism(clip, budget, noise, sampler, adaptive=adaptive),
        algorithm,
        batching,
        hardware=hardware or fa.Hardware(ONE),
    )
    return Run(simulation, store, layout)


def trained_by(run, rounds=ROUNDS, start=None):
    state = run.simulation.init(START) if start is None else start
    for after, metrics in run.simulation.run(state, rounds):
        state = after
        assert metrics.invalid == 0
    return state


# ------------------------------------------------------------- the algorithms, as papers have them


def local_steps(x, points, change=lambda y, g: g):
    y = x.copy()
    for a in points:
        y = y - RATE * change(y, SCALES * (y - a))
    return y


def fedavg_by_hand(cohorts, x, own):
    for cohort in cohorts:
        x = x - SERVER * np.mean([x - local_steps(x, p) for _, p in cohort], axis=0)
    return x, own


def scaffold_by_hand(cohorts, x, own):
    own, c = np.zeros((USERS, 3)), np.zeros(3)
    for cohort in cohorts:
        deltas, changes = [], []
        for i, points in cohort:
            y = local_steps(x, points, lambda y, g, i=i, c=c: g - own[i] + c)
            new = own[i] - c + (x - y) / (len(points) * RATE)
            deltas.append(x - y)
            changes.append(new - own[i])
            own[i] = new
        x = x - SERVER * np.mean(deltas, axis=0)
        c = c + len(cohort) / USERS * np.mean(changes, axis=0)
    return x, own


def feddyn_by_hand(cohorts, x, own, alpha=0.1):
    """With SERVER of the step in place of the paper's 1."""
    own, h = np.zeros((USERS, 3)), np.zeros(3)
    for cohort in cohorts:
        ends = []
        for i, points in cohort:
            y = local_steps(x, points, lambda y, g, i=i, x=x: g - own[i] + alpha * (y - x))
            own[i] = own[i] - alpha * (y - x)
            ends.append(y)
        h = h - alpha / USERS * sum(y - x for y in ends)
        x = x - SERVER * (x - (np.mean(ends, axis=0) - h / alpha))
    return x, own


def fednova_by_hand(cohorts, x, own, steps=None):
    for cohort in cohorts:
        taken = np.array([len(p) for _, p in cohort])
        ways = [(x - local_steps(x, p)) / len(p) for _, p in cohort]
        x = x - SERVER * (steps or taken.mean()) * np.mean(ways, axis=0)
    return x, own


def fedexp_by_hand(cohorts, x, own, eps=1e-3):
    for cohort in cohorts:
        deltas = np.array([x - local_steps(x, p) for _, p in cohort])
        mean = deltas.mean(0)
        step = max(1.0, (deltas**2).sum() / (2 * len(cohort) * ((mean**2).sum() + eps)))
        x = x - SERVER * step * mean
    return x, own


def mimelite_by_hand(cohorts, x, own, momentum=0.9):
    m = np.zeros(3)
    for cohort in cohorts:
        ends = [
            local_steps(x, p, lambda y, g, m=m: (1 - momentum) * g + momentum * m)
            for _, p in cohort
        ]
        whole = np.mean([SCALES * (x - p.mean(0)) for _, p in cohort], axis=0)
        x = x - SERVER * np.mean([x - y for y in ends], axis=0)
        m = (1 - momentum) * whole + momentum * m
    return x, own


def mime_by_hand(cohorts, x, own, momentum=0.9):
    c, m = np.zeros(3), np.zeros(3)
    for round, cohort in enumerate(cohorts):
        if round % 2 == 0:
            c = np.mean([SCALES * (x - p.mean(0)) for _, p in cohort], axis=0)
            continue

        def change(y, g, c=c, m=m, x=x):
            return (1 - momentum) * (SCALES * (y - x) + c) + momentum * m

        x = x - SERVER * np.mean([x - local_steps(x, p, change) for _, p in cohort], axis=0)
        m = (1 - momentum) * c + momentum * m
    return x, own


def reptile_by_hand(cohorts, x, own, anneal=30.0):
    for round, cohort in enumerate(cohorts):
        step = SERVER * max(0.0, 1 - round / anneal)
        x = x - step * np.mean([x - local_steps(x, p) for _, p in cohort], axis=0)
    return x, own


def fomaml_by_hand(cohorts, x, own):
    for cohort in cohorts:
        grads = [SCALES * (local_steps(x, p[:-1]) - p[-1]) for _, p in cohort]
        x = x - SERVER * np.mean(grads, axis=0)
    return x, own


def ditto_by_hand(cohorts, x, own, attraction=0.1):
    own = [None] * USERS
    for cohort in cohorts:
        ends = [local_steps(x, p) for _, p in cohort]
        for i, points in cohort:
            v = x if own[i] is None else own[i]
            own[i] = local_steps(v, points, lambda y, g, x=x: g + attraction * (y - x))
        x = x - SERVER * np.mean([x - y for y in ends], axis=0)
    return x, own


def pfedme_by_hand(cohorts, x, own, attraction=2.0, rate=0.5):
    own = [None] * USERS
    for cohort in cohorts:
        ends = []
        for i, points in cohort:
            own[i] = local_steps(x, points, lambda y, g, x=x: g + attraction * (y - x))
            ends.append(own[i])
        x = x - SERVER * rate * attraction * np.mean([x - y for y in ends], axis=0)
    return x, own


BY_HAND = {
    "federated": (fedavg_by_hand, {}),
    "scaffold": (scaffold_by_hand, {}),
    "feddyn": (feddyn_by_hand, {}),
    "fednova": (fednova_by_hand, {}),
    "fednova, public steps": (functools.partial(fednova_by_hand, steps=2.0), {"steps": 2.0}),
    "fedexp": (fedexp_by_hand, {}),
    "mimelite": (mimelite_by_hand, {}),
    "mime": (functools.partial(mime_by_hand, momentum=0.5), {"momentum": 0.5, "unit": 0.01}),
    "reptile": (reptile_by_hand, {"anneal": 30.0}),
    "fomaml": (fomaml_by_hand, {}),
    "ditto": (ditto_by_hand, {}),
    "pfedme": (pfedme_by_hand, {"attraction": 2.0, "rate": 0.5}),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_as_by_hand(case, tmp_path):
    by_hand, options = BY_HAND[case]
    run = make(name := case.split(",")[0], tmp_path, **options)
    state = run.simulation.init(START)
    cohorts = list(run.cohorts(state))
    assert {len(points) for cohort in cohorts for _, points in cohort} == {1, 2, 3, 4}
    state = trained_by(run, start=state)
    expected, own = by_hand(cohorts, np.float64(START["w"]), None)
    np.testing.assert_allclose(state.params["w"], expected, rtol=1e-5, atol=1e-6)
    others = fedavg_by_hand(cohorts, np.float64(START["w"]), None)[0]
    if name not in ("federated", "ditto"):  # it is another algorithm at all
        assert np.abs(expected - others).max() > 1e-3
    if own is None:
        return
    for found, wanted in zip(run.memory(), own, strict=True):
        found = found["model"] if name in ("ditto", "pfedme") else found
        np.testing.assert_allclose(found["w"], wanted, rtol=1e-5, atol=2e-6)


def test_gradients_are_clipped_before_they_are_corrected(tmp_path):
    """So that what a client remembers is made of bounded gradients."""
    bound = 0.2
    update = fa.local_training(squares, optax.sgd(RATE), grad_clip=bound)
    run = make("scaffold", tmp_path, update=update)
    trained_by(run, 3)
    norms = [np.sqrt(sum(np.sum(np.square(x)) for x in m.values())) for m in run.memory()]
    assert max(norms) <= bound * (1 + 1e-6)
    assert sum(n > 0.9 * bound for n in norms) > 2


# ------------------------------------------------------------------- what they have in common


NAMES = list(BY_HAND)


def state_of(run, state):
    rows = [] if run.store is None else run.store.gather(range(USERS), run.layout.extract(START))
    return jax.device_get((state.params, state.opt_state)), np.asarray(rows)


@pytest.mark.parametrize("case", NAMES)
def test_chunks_devices_and_empty_slots_change_nothing(case, tmp_path):
    name, options = case.split(",")[0], BY_HAND[case][1]
    ways = [fa.Hardware(ONE), fa.Hardware(jax.devices()[:2], chunk=2)]  # one slot of four is empty
    found = []
    for i, hardware in enumerate(ways):
        run = make(name, tmp_path / str(i), hardware=hardware, **options)
        found.append(state_of(run, trained_by(run, 4)))
    assert np.abs(found[0][0][0]["w"] - START["w"]).max() > 0.1
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("case", NAMES)
def test_a_run_goes_on_to_the_same_bits(case, tmp_path):
    """From the state and the rows of round 2, though the process got to round 3."""
    name, options = case.split(",")[0], BY_HAND[case][1]
    run = make(name, tmp_path / "whole", **options)
    whole = state_of(run, trained_by(run, 4))
    run = make(name, tmp_path / "cut", **options)
    kept = jax.device_get(trained_by(run, 2))
    trained_by(run, 1, run.simulation.transfer(kept))
    if run.store is not None:
        run.store.close()  # `make` opens the folder again
    run = make(name, tmp_path / "cut", **options)
    if run.store is not None:
        run.store.restore(2)
    again = state_of(run, trained_by(run, 2, run.simulation.transfer(kept)))
    for one, other in zip(*map(jax.tree.leaves, (whole, again)), strict=True):
        np.testing.assert_array_equal(one, other)


def fedavg(rounds=3, **options):
    run = make("federated", **options)
    return trained_by(run, rounds).params["w"]


def test_what_is_federated_averaging_in_a_special_case(tmp_path):
    same = fa.Batching(1, steps=2)
    plain = fedavg()
    cases = {
        "scaffold": (1, {}),  # all variates are zero in the first round
        "feddyn": (3, {"share": 0.0, "alpha": 1e-9}),
        "fednova": (3, {"batching": same}),
        "fedexp": (3, {"eps": 1e9}),
        "mimelite": (3, {"momentum": 0.0}),
        "reptile": (3, {}),
        "ditto": (3, {}),
        "pfedme": (3, {"attraction": 1e-6, "rate": 1e6}),
    }
    for name, (rounds, options) in cases.items():
        run = make(name, tmp_path / name, **options)
        expected = fedavg(rounds, batching=same) if "batching" in options else plain
        expected = fedavg(1) if rounds == 1 else expected
        found = trained_by(run, rounds).params["w"]
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
    # Mime asks everybody, and a step goes along the gradient of all: one round of averaging.
    whole = {"batching": fa.Batching(4, steps=1), "sampler": fa.ShuffledSampler(USERS, USERS, 0)}
    run = make("mime", momentum=0.0, **whole)
    np.testing.assert_allclose(trained_by(run, 2).params["w"], fedavg(1, **whole), rtol=1e-6)
    one = fa.Batching(1, steps=1)
    gradient = fa.local_training(squares, optax.sgd(1.0), grad_clip=None)
    found = trained_by(make("fomaml", batching=one), 3).params["w"]
    np.testing.assert_allclose(found, fedavg(batching=one, update=gradient), rtol=1e-6)


def test_a_users_own_model_is_trained_with_a_key_of_its_own(tmp_path):
    """Without attraction it is the common training but for what is drawn."""

    def noisy(params, batch, key):
        value, aux = squares(params, batch, key)
        return value + params["w"] @ jax.random.normal(key, (3,)), aux

    update = fa.local_training(noisy, optax.sgd(RATE), grad_clip=None)
    sampler = fa.ShuffledSampler(USERS, 1, seed=0)
    run = make("ditto", tmp_path, update=update, server=optax.sgd(1.0), sampler=sampler,
               attraction=0.0)  # fmt: skip
    common = trained_by(run, 1).params["w"]
    (own,) = (m["model"]["w"] for m in run.memory() if m["met"])
    assert np.abs(own - common).max() > 1e-3


def test_a_part_of_the_variables(tmp_path):
    """Memory, messages and users' own models are of what is trained."""
    subset = Subset("fixed", ("^w$",))
    trained = subset.trained(START)
    update = partial_training(
        lambda loss: fa.local_training(loss, optax.sgd(RATE), grad_clip=None), squares, subset
    )
    for name in ("scaffold", "feddyn", "mimelite", "mime", "ditto"):
        whole = make(name, tmp_path / name)
        part = make(name, tmp_path / f"{name} in part", update=update, trained=trained)
        one, other = (trained_by(run, 3).params["w"] for run in (whole, part))
        np.testing.assert_allclose(one, other, rtol=1e-6)
        if part.layout is not None:
            assert part.layout.size < whole.layout.size
    models = [part.layout.insert(START, row) for row in part.store.gather(range(6), np.zeros(4))]
    for model, memory in zip(models, whole.memory(), strict=True):
        expected = memory["model"]["w"] if memory["met"] else START["w"]
        np.testing.assert_allclose(model["w"], expected, rtol=1e-6)
        np.testing.assert_array_equal(model["v"], START["v"])


def test_while_bounds_warm_up_nobody_remembers(tmp_path):
    """Else the server's control variate would for ever be another than the mean of the clients'."""
    adaptive = AdaptiveClip(0.0, warmup=2, rate=1e-9, warmup_rate=1e-9)
    run = make("scaffold", tmp_path, clip=1e6, adaptive=adaptive)
    state = trained_by(run, 2)
    assert not run.store.known.any()
    state = trained_by(run, 3, state)
    assert run.store.known.any()
    control = run.simulation._view(state).params.broadcast
    for name, found in jax.device_get(control).items():
        expected = np.mean([m[name] for m in run.memory()], axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------- privacy


class Chosen(fa.FixedSizeSampler):
    """Takes the users that it is told to."""

    chosen = np.arange(0)

    def cohort(self, round):
        return Chosen.chosen

    def reseeded(self, seed):
        return self


HOSTILE = fa.InMemoryCorpus(
    {f"u{i}": [{"x": np.float32(10.0**i) * x} for x in own] for i, own in enumerate(POINTS)}
)


@pytest.mark.parametrize(
    ("case", "budget"),
    [*((case, "global") for case in NAMES), ("scaffold", "uniform"), ("scaffold", "adaptive")],
)
def test_a_user_moves_the_sum_by_the_clip_norm(case, budget, tmp_path):
    """Whatever is sent, and whatever the user and the server remember of the round before."""
    name, options = case.split(",")[0], BY_HAND[case][1]
    bound = 0.3  # of bounds that adapt: in units of their scales, which are what the sum is in
    if budget == "adaptive":
        budget, options = "uniform", {"adaptive": AdaptiveClip(0.0)}
    run = make(name, tmp_path, clip=bound, corpus=HOSTILE, budget=budget,
               sampler=Chosen(USERS, USERS, seed=0), **options)  # fmt: skip
    sums = []
    total = run.simulation._cohort.total

    def watched(accumulator):
        found = total(accumulator)
        sums.append([np.float64(x) for x in jax.tree.leaves(jax.device_get(found.delta))])
        return found

    run.simulation._cohort = run.simulation._cohort._replace(total=watched)

    def sum_of(users, state):
        if run.store is not None:
            run.store.restore(int(state.round))
        Chosen.chosen = np.asarray(users)
        ((after, _),) = run.simulation.run(state, 1)
        return sums[-1], after

    start = run.simulation.init(START)
    everyone = list(range(USERS))
    for _ in range(2):  # without memory, with it
        everybody, _ = sum_of(everyone, start)
        longest = 0.0
        for user in everyone:
            alone, _ = sum_of([user], start)
            others, _ = sum_of([u for u in everyone if u != user], start)
            assert norm(alone) <= bound * (1 + 1e-6)
            assert norm(differences(everybody, others)) <= bound * (1 + 1e-5)
            longest = max(longest, norm(alone))
        assert longest > 0.5 * bound
        _, start = sum_of(everyone, start)


def norm(leaves):
    return np.sqrt(sum(np.sum(np.square(x)) for x in leaves))


def differences(one, other):
    return [a - b for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("case", NAMES)
def test_with_noise_it_trains_or_is_refused(case, tmp_path):
    name, options = case.split(",")[0], BY_HAND[case][1]
    sampler = fa.PoissonSampler(USERS, COHORT, seed=0)
    if case in ("fednova", "fedexp"):
        with pytest.raises(fa.UserError, match=f"^{name} .*: ") as caught:
            make(name, tmp_path, clip=0.3, noise=1.0, sampler=sampler, **options)
        assert "\n" not in str(caught.value)
        return
    found = []
    for i, noise in enumerate((1.0, 2.0)):
        run = make(name, tmp_path / str(i), clip=0.3, noise=noise, sampler=sampler, **options)
        state = trained_by(run, 3)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
        found.append(np.asarray(state.params["w"]))
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_all_that_is_sent_gets_noise(tmp_path):
    """The control variate that clients are sent is as noisy as the model."""
    run = make("scaffold", tmp_path, clip=1e-6, noise=1e4, sampler=fa.PoissonSampler(6, 3, 0))
    state = run.simulation.init(START)
    ((state, _),) = run.simulation.run(state, 1)
    moved = jax.tree.map(np.subtract, jax.device_get(state.params), START)
    control = run.simulation._view(state).broadcast
    std = 1e-6 * 1e4 / COHORT
    for leaf, factor in [(moved, SERVER), (jax.device_get(control), SHARE / UNIT)]:
        values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(leaf)]) / factor
        assert 0.2 * std < np.sqrt(np.mean(values**2)) < 3 * std


# ------------------------------------------------------------------------------------ refusals


def test_what_does_not_go_together(tmp_path):
    layout = fa.make_layout(START, ("^v$",))
    rounded = lambda params, batches, num_steps, key, max_steps=None, round=0: None  # noqa: E731
    facts = Facts(SHARE, UNIT)
    with fa.LocalStore(tmp_path / "local", layout, USERS) as store:
        with pytest.raises(fa.UserError, match=r"unset local\.patterns"):
            fa.Simulation(
                CORPUS,
                fa.Mechanism(np.inf, "global", 0.0, fa.FixedSizeSampler(USERS, COHORT, seed=0)),
                make_algorithm("scaffold", UPDATE, SGD, facts, {}, store=store),
                EACH,
            )
    for name, options, message in [
        ("scaffold", {}, "remembers its users"),
        ("fednova", {"steps": -1.0}, "steps=-1.0"),
        ("fednova", {"step": 1.0}, "'step', which 'fednova' does not take: it takes steps"),
        ("mimelite", {"momentum": 1.0}, "momentum=1.0"),
        ("mime", {"momentum": 1.0}, "momentum=1.0"),
        ("fedexp", {"eps": 0.0}, "eps=0.0"),
        ("reptile", {"anneal": -1.0}, "anneal=-1.0"),
    ]:
        with pytest.raises(fa.UserError, match=message):
            make_algorithm(name, UPDATE, SGD, facts, options)
    for name, options in [
        ("feddyn", {"alpha": 0.0}),
        ("ditto", {"attraction": -1.0}),
        ("pfedme", {"rate": 0.0}),
    ]:
        with pytest.raises(fa.UserError, match=f"{next(iter(options))}="):
            make(name, tmp_path / name, **options)
    for name in ("scaffold", "feddyn", "mimelite", "mime", "fomaml", "ditto", "pfedme"):
        with pytest.raises(fa.UserError, match="unset compression"):
            make(name, tmp_path / name, update=rounded)
    assert option_names("federated") == []
    assert option_names("scaffold") == ["share", "unit"]


def test_noise_in_shares_has_no_room_for_messages(tmp_path):
    store = fa.LocalStore(tmp_path, memory_layout("scaffold", START), USERS)
    secure = fa.SecureAggregation(4, 16)
    sampler = fa.PoissonSampler(USERS, COHORT, seed=0)
    with pytest.raises(fa.UserError, match="room for the model's updates alone"):
        fa.Simulation(
            CORPUS,
            fa.Mechanism(1.0, "global", 1.0, sampler, secure=secure),
            make_algorithm("scaffold", UPDATE, SGD, Facts(SHARE, UNIT), {}, store=store),
            EACH,
        )


def test_local_variables_first_then_the_shared_ones(tmp_path):
    """FedRep by hand, of a model w + v with v the user's own; and FedPer is another algorithm."""

    def sum_of_both(params, batch, key):
        error = (params["w"] + params["v"] - batch["x"]) ** 2 * SCALES
        return 0.5 * jnp.sum(error * batch["mask"][:, None]), {}

    start = {"w": START["w"], "v": np.zeros(3, np.float32)}
    layout = fa.make_layout(start, ("^v$",))
    update = fa.local_training(sum_of_both, optax.sgd(RATE), grad_clip=None)
    found = {}
    for name in ("fedrep", "federated"):
        store = fa.LocalStore(tmp_path / name, layout, USERS)
        simulation = fa.Simulation(
            CORPUS,
            fa.Mechanism(np.inf, "global", 0.0, fa.FixedSizeSampler(USERS, COHORT, seed=0)),
            make_algorithm(name, update, SGD, Facts(SHARE, UNIT), {}, store=store),
            EACH,
            hardware=fa.Hardware(ONE),
        )
        run, state = Run(simulation, store, None), simulation.init(start)
        cohorts = list(run.cohorts(state, 5))
        *_, (state, _) = simulation.run(state, 5)
        found[name] = state.params["w"], store.gather(range(USERS), np.zeros(3, np.float32))
    w, v = np.float64(start["w"]), np.zeros((USERS, 3))
    for cohort in cohorts:
        ends = []
        for i, points in cohort:
            for a in points:
                v[i] -= RATE * SCALES * (w + v[i] - a)
            y = w.copy()
            for a in points:
                y -= RATE * SCALES * (y + v[i] - a)
            ends.append(y)
        w = w - SERVER * np.mean([w - y for y in ends], axis=0)
    np.testing.assert_allclose(found["fedrep"][0], w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["fedrep"][1], v, rtol=1e-5, atol=1e-6)
    assert np.abs(found["federated"][0] - w).max() > 1e-3
    with pytest.raises(fa.UserError, match=r"name them in local\.patterns"):
        make("fedrep", tmp_path / "none")
