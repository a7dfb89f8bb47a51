"""How far one user can move the cohort's sum: the number that the noise is scaled to.

The path is the real one, from a client's update through `Mechanism.client_transform` and
`make_cohort` to the total; only the local training is replaced by updates of our choosing, which
are as hostile as their dtype allows. What holds, for updates of any size:

* A user's contribution, the sum over a cohort of that user alone, has norm at most C (1 + 1e-6).
* The sum is that of the contributions, but for the rounding of float32 additions. However n users
  are added up (in any order, by chunks, on several devices), a partial sum of k of them is rounded
  by at most 2^-24 k C, and all the partial sums together by less than n (n + 1) / 2 * 2^-24 C.
* Weights in [0, 1], the users' own and those that devices decide (whatever they answer), change
  none of this: the weighted path is held to the same bounds.
* Local parameters and their updates, whatever they are, change no bit of the sum of given shared
  updates; and where shared updates depend on them, they are held to the same bounds.
* The sums with and without a user hence differ by at most C (1 + 1e-6 + n^2 2^-24), which is below
  C (1 + 1e-5) for cohorts of up to 12 users.

The property test draws 280 cohorts of 5 users on average. Every user is measured alone and is left
out of the sum in two ways: some 4000 comparisons with these bounds, 2700 of them sensitivities.

For larger cohorts the last term remains, which is float32's and not the clipping's. To exceed C by
x C costs as much privacy as a noise multiplier that is smaller by the factor 1 + x. Simulated:

* Users that send nearly the same update at the bound: x is up to 1e-5 for 64 of them, 2e-4 for 1024
  and 7e-4 for 4096, if all of it is in one parameter; spread over 1000 parameters, 6e-6 for 1024.
* Users that work together, knowing each other's updates and the order of addition: 1.05e-5 for 28
  of them and 1.6e-2 for 1024 (`test_the_rounding_of_many_users`).
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedasr.data.batching import Chunk
from fedasr.federated.client import ClientMetrics
from fedasr.federated.cohort import Cohort, client_mesh, make_cohort
from fedasr.federated.local import make_layout, with_local
from fedasr.privacy.clipping import layer_bounds
from fedasr.privacy.mechanism import Mechanism
from fedasr.privacy.sampling import PoissonSampler

SHAPES = {"encoder/bias": (5,), "encoder/kernel": (3, 5), "scale": ()}
MOST = 12  # users of a cohort: as many as the bound of 1e-5 is proven for
ROUNDING = 2.0**-24


def by_module(path):
    return path.split("/")[0]


def skewed(sizes):
    return [0.0, *range(1, len(sizes))]


# name: arguments of the mechanism, C
MODES = {
    "global": (dict(budget="global"), 1.0),
    "uniform": (dict(budget="uniform"), 0.37),
    "dim": (dict(budget="dim"), 300.0),
    "callable": (dict(budget=skewed), 0.01),
    "groups": (dict(budget="dim", layers=by_module), 1e-25),
    "normalised": (dict(budget="uniform", normalise=True), 1.0),
    "normalised groups": (dict(budget=np.sqrt, layers=by_module, normalise=True), 0.37),
}
DTYPES = {
    "float32": ["float32"] * 3,
    "bfloat16": ["bfloat16"] * 3,
    "float16": ["float16"] * 3,
    "mixed": ["bfloat16", "float32", "float16"],
}
LAYOUTS = [(1, 1), (4, 1), (1, 2), (3, 2)]  # clients vmapped on a device, devices
# Every pair of a mode, a dtype and a layout meets.
SETUPS = [
    (mode, list(DTYPES)[(i + j) % len(DTYPES)], *layout)
    for (i, mode), (j, layout) in itertools.product(enumerate(MODES), enumerate(LAYOUTS))
]


class Path(NamedTuple):
    cohort: Cohort
    params: dict
    slots: int
    clip_norm: float
    layers: list  # names of the leaves that the mechanism bounds together, and their bound


def send(params, batches, num_steps, key, max_steps=None, round=0):
    """A client update that returns what its data say, even from an empty slot."""
    del params, num_steps, key, max_steps, round
    return {name: batches[name] for name in SHAPES}, ClientMetrics(jnp.float32(0), {})


def answer(params, delta, batches, key):
    """A device's weight that is what its data say: nothing is too wrong to be answered."""
    del params, delta, key
    return batches["own"]


@functools.cache
def path(mode, dtype, chunk, devices, weighted=False):
    """The jitted sum of one mode, compiled once."""
    options, clip_norm = MODES[mode]
    mechanism = Mechanism(
        clip_norm,
        noise_multiplier=1.0,
        sampler=PoissonSampler(9, 3, 0),
        weighting="bounded" if weighted else "uniform",
        **options,
    )
    params = {
        name: np.zeros(shape, jnp.dtype(kind))
        for (name, shape), kind in zip(SHAPES.items(), DTYPES[dtype], strict=True)
    }
    if options["budget"] == "global":
        layers = [(list(SHAPES), clip_norm)]
    else:
        name_of = options.get("layers") or str
        bounds = layer_bounds(params, clip_norm, options["budget"], options.get("layers"))
        names = [list(group) for _, group in itertools.groupby(SHAPES, name_of)]
        layers = list(zip(names, bounds, strict=True))
    mesh = client_mesh(jax.devices()[:devices])
    cohort = make_cohort(
        send, mechanism.client_transform(), mesh, weigh=answer if weighted else None
    )
    return Path(cohort, params, chunk * devices, clip_norm, layers)


def total(path, updates, order, absent=(), weights=None):
    """The sum's delta, float64, over the users `order`; those `absent` have a slot but no steps.

    `updates` and `weights` have one more row than users: what the slots beyond `order` hold.
    """
    order = np.asarray(order, np.int32)
    present = ~np.isin(order, absent)
    slots = max(-(-len(order) // path.slots), 1) * path.slots
    padding = slots - len(order)
    order = np.r_[order, np.full(padding, len(updates["scale"]) - 1, np.int32)]
    present = np.r_[present, np.zeros(padding, bool)]
    accumulator = None
    for start in range(0, slots, path.slots):
        part = slice(start, start + path.slots)
        chunk = Chunk(
            {name: values[order[part]] for name, values in updates.items()},
            present[part].astype(np.int32) * 3,
            order[part],
            present[part].astype(np.float32) if weights is None else weights[order[part]],
        )
        if accumulator is None:
            accumulator = path.cohort.zeros(path.params, chunk)
        accumulator = path.cohort.add(accumulator, path.params, chunk, KEY, np.int32(0))
    delta = jax.device_get(path.cohort.total(accumulator)).delta
    return np.concatenate([np.ravel(delta[name]) for name in SHAPES]).astype(np.float64)


KEY = jax.random.key(0)

PATTERNS = {
    "zero": lambda rng, shape: np.zeros(shape),
    "normal": lambda rng, shape: rng.normal(size=shape),
    "one sign": lambda rng, shape: rng.uniform(0.9, 1.0, shape),
    "constant": lambda rng, shape: np.full(shape, rng.uniform(1, 2)),
    "one element": lambda rng, shape: np.eye(1, math.prod(shape)).reshape(shape),
    "any magnitude": lambda rng, shape: 10.0 ** rng.uniform(-45, 30, shape),
}
MAGNITUDES = [0, -45, -40, -20, -8, -3, 3, 8, 20, 30, 39]
leaf_kinds = st.tuples(st.sampled_from(list(PATTERNS)), st.sampled_from(MAGNITUDES))
user_kinds = st.tuples(
    st.integers(0, 2**32 - 1),
    st.tuples(*[leaf_kinds] * len(SHAPES)),
    st.sampled_from(["as is", "whole at the bound", "layers at their bounds"]),
    st.sampled_from([0.0, -1e-6, -1e-7, 1e-7, 1e-6, 1e-5]),  # how far beyond the bound
    st.sampled_from([None] * 7 + [np.nan, np.inf, -np.inf]),
)


def scaled(values, length):
    norm = math.sqrt(sum(float(np.sum(x**2)) for x in values.values()))
    return {name: x * (length / norm if norm else 0.0) for name, x in values.items()}


def update_of(kind, path):
    seed, leaves, fit, beyond, bad = kind
    rng = np.random.default_rng(seed)
    values = {
        name: PATTERNS[pattern](rng, shape) * 10.0**magnitude
        for (name, shape), (pattern, magnitude) in zip(SHAPES.items(), leaves, strict=True)
    }
    if fit == "whole at the bound":
        values = scaled(values, path.clip_norm * (1 + beyond))
    elif fit == "layers at their bounds":
        for names, bound in path.layers:
            values |= scaled({name: values[name] for name in names}, bound * (1 + beyond))
    for name, x in values.items():
        dtype = path.params[name].dtype
        largest = float(jnp.finfo(dtype).max)
        values[name] = np.clip(x, -largest, largest).astype(dtype)
    if bad is not None:
        broken = values[rng.choice(list(values))]
        broken.reshape(-1)[rng.integers(broken.size)] = bad
    return values


@pytest.mark.parametrize(("mode", "dtype", "chunk", "devices"), SETUPS)
@given(kinds=st.lists(user_kinds, min_size=1, max_size=MOST), alike=st.booleans())
@settings(deadline=None, max_examples=10)
def test_a_user_moves_the_sum_by_at_most_the_clip_norm(mode, dtype, chunk, devices, kinds, alike):
    setup = path(mode, dtype, chunk, devices)
    clip_norm, count = setup.clip_norm, len(kinds)
    each = [update_of(kind, setup) for kind in (kinds[:1] * count if alike else kinds)]
    garbage = {name: np.full(shape, np.nan) for name, shape in SHAPES.items()}
    updates = {
        name: np.stack([*[u[name] for u in each], garbage[name].astype(setup.params[name].dtype)])
        for name in SHAPES
    }
    everybody = np.arange(count)
    others = [np.delete(everybody, user) for user in everybody]

    contributions = [total(setup, updates, [user]) for user in everybody]
    for update, contribution in zip(each, contributions, strict=True):
        assert np.linalg.norm(contribution) <= clip_norm * (1 + 1e-6)
        if not all(np.isfinite(x.astype(np.float32)).all() for x in update.values()):
            assert not contribution.any()

    result = total(setup, updates, everybody)
    rounding = count * (count + 1) / 2 * ROUNDING * clip_norm * (1 + 1e-5)
    assert np.linalg.norm(result - np.sum(contributions, axis=0)) <= rounding

    limit = clip_norm * (1 + 1e-5)
    for user, remaining in enumerate(others):
        # As an empty slot; and not there at all, so that the next ones move up to other chunks.
        assert np.linalg.norm(result - total(setup, updates, everybody, [user])) <= limit
        assert np.linalg.norm(result - total(setup, updates, remaining)) <= limit


WEIGHTED = [(mode, *SETUPS[4 * i + i % 4][1:]) for i, mode in enumerate(MODES)]
hosts = st.sampled_from([0.0, 1e-38, 0.3, 1 - 2.0**-24, 1.0])  # what `check_weights` lets pass
answers = st.sampled_from(
    [np.nan, np.inf, -np.inf, -1.0, 0.0, 1e-30, 0.5, 1.0, 1 + 2.0**-23, 7.0, 3e38]
)


@pytest.mark.parametrize(("mode", "dtype", "chunk", "devices"), WEIGHTED)
@given(users=st.lists(st.tuples(user_kinds, hosts, answers), min_size=1, max_size=MOST))
@settings(deadline=None, max_examples=10)
def test_weights_do_not_raise_what_a_user_moves(mode, dtype, chunk, devices, users):
    plain, setup = path(mode, dtype, chunk, devices), path(mode, dtype, chunk, devices, True)
    clip_norm, count = setup.clip_norm, len(users)
    each = [update_of(kind, setup) for kind, _, _ in users]
    garbage = {name: np.full(shape, np.nan) for name, shape in SHAPES.items()}
    updates = {
        name: np.stack([*[u[name] for u in each], garbage[name].astype(setup.params[name].dtype)])
        for name in SHAPES
    }
    weights = np.asarray([*[host for _, host, _ in users], np.nan], np.float32)
    own = np.asarray([*[said for _, _, said in users], np.nan], np.float32)
    weighted = updates | {"own": own}
    everybody = np.arange(count)

    contributions = [total(setup, weighted, [u], weights=weights) for u in everybody]
    for user, contribution in enumerate(contributions):
        assert np.linalg.norm(contribution) <= clip_norm * (1 + 1e-6)
        alone = total(plain, updates, [user])
        factor = weights[user] * np.clip(own[user], 0, 1) if np.isfinite(own[user]) else 0.0
        error = np.linalg.norm(contribution - alone * np.float64(factor))
        assert error <= clip_norm * 2.0**-22 + 1e-38
        assert np.all(np.abs(contribution) <= np.abs(alone))  # no element grows by rounding

    result = total(setup, weighted, everybody, weights=weights)
    rounding = count * (count + 1) / 2 * ROUNDING * clip_norm * (1 + 1e-5)
    assert np.linalg.norm(result - np.sum(contributions, axis=0)) <= rounding
    limit = clip_norm * (1 + 1e-5)
    for user in everybody:
        empty = total(setup, weighted, everybody, [user], weights)
        remaining = total(setup, weighted, np.delete(everybody, user), weights=weights)
        assert np.linalg.norm(result - empty) <= limit
        assert np.linalg.norm(result - remaining) <= limit


OWN = 4  # numbers of a local parameter


def send_and_keep(params, batches, num_steps, key, max_steps=None, round=0):
    """`send`, with an update of the local parameter; if they leak, it shows in what is sent."""
    delta, metrics = send(params, batches, num_steps, key, max_steps, round)
    seen = jnp.where(batches["leak"], params["own"][0], 0.0)
    delta = {
        name: jnp.where(batches["leak"], d + seen, d).astype(d.dtype) for name, d in delta.items()
    }
    return delta | {"own": batches["own"]}, metrics


@functools.cache
def local_path(mode, dtype, chunk, devices):
    """The same path as `path` for a model with a local parameter more."""
    plain = path(mode, dtype, chunk, devices)
    options, clip_norm = MODES[mode]
    mechanism = Mechanism(
        clip_norm, noise_multiplier=1.0, sampler=PoissonSampler(9, 3, 0), **options
    )
    params = plain.params | {"own": np.zeros(OWN, np.float32)}
    layout = make_layout(params, ("^own$",))
    clip = mechanism.client_transform()
    shared = {name: params[name] for name in SHAPES}
    clip = clip._replace(init=lambda _, init=clip.init: init(shared | {"own": optax.MaskedNode()}))
    mesh = client_mesh(jax.devices()[:devices])
    cohort = make_cohort(with_local(send_and_keep, layout), clip, mesh, local=True)
    return plain._replace(cohort=cohort, params=params)


def local_total(path, updates, order, rows):
    """(the sum's delta as in `total`, {user: new local parameter}, all of the sum)."""
    order = np.asarray(order, np.int32)
    slots = max(-(-len(order) // path.slots), 1) * path.slots
    present = np.arange(slots) < len(order)
    order = np.r_[order, np.full(slots - len(order), len(rows) - 1, np.int32)]
    accumulator, kept = None, []
    for start in range(0, slots, path.slots):
        part = slice(start, start + path.slots)
        chunk = Chunk(
            {name: values[order[part]] for name, values in updates.items()},
            present[part].astype(np.int32) * 3,
            order[part],
            present[part].astype(np.float32),
            rows[order[part]],
        )
        if accumulator is None:
            accumulator = path.cohort.zeros(path.params, chunk)
        accumulator, new = path.cohort.add(accumulator, path.params, chunk, KEY, np.int32(0))
        kept.append(np.asarray(new))
    sums = jax.device_get(path.cohort.total(accumulator))
    delta = np.concatenate([np.ravel(sums.delta[name]) for name in SHAPES]).astype(np.float64)
    own = np.concatenate(kept)
    assert own[~present].tobytes() == rows[order[~present]].tobytes()  # empty slots' stay
    return delta, dict(zip(order[present].tolist(), own, strict=False)), sums


owns = st.lists(
    st.sampled_from([0.0, 1.0, -1e-30, 3e38, -3e38, 1e10, np.nan, np.inf, -np.inf]),
    min_size=2 * OWN,
    max_size=2 * OWN,
)


@pytest.mark.parametrize(("mode", "dtype", "chunk", "devices"), WEIGHTED[::3])
@given(users=st.lists(st.tuples(user_kinds, owns), min_size=1, max_size=MOST), other=owns)
@settings(deadline=None, max_examples=10)
def test_local_parameters_have_no_path_to_the_server(mode, dtype, chunk, devices, users, other):
    plain = path(mode, dtype, chunk, devices)
    setup = local_path(mode, dtype, chunk, devices)
    clip_norm, count = setup.clip_norm, len(users)
    each = [update_of(kind, setup) for kind, _ in users]
    garbage = {name: np.full(shape, np.nan) for name, shape in SHAPES.items()}
    updates = {
        name: np.stack([*[u[name] for u in each], garbage[name].astype(setup.params[name].dtype)])
        for name in SHAPES
    }
    own = np.asarray([*[values for _, values in users], [np.nan] * 2 * OWN], np.float32)
    rows, changes = own[:, :OWN], own[:, OWN:]
    everybody = np.arange(count)

    # Given what is sent, nobody's own can be told from the sum or from other users' own.
    silent = updates | {"own": changes, "leak": np.zeros(count + 1, bool)}
    delta, kept, sums = local_total(setup, silent, everybody, rows)
    assert delta.tobytes() == total(plain, updates, everybody).tobytes()
    assert jax.tree.structure(sums.delta) == jax.tree.structure(
        {name: 0 for name in SHAPES} | {"own": optax.MaskedNode()}
    )
    assert OWN not in {size for x in jax.tree.leaves(sums) for size in np.shape(x)}
    with np.errstate(over="ignore", invalid="ignore"):
        new = rows - changes
    for user in everybody:
        finite = all(np.isfinite(u.astype(np.float32)).all() for u in each[user].values())
        fine = finite and np.isfinite(new[user]).all()
        np.testing.assert_array_equal(kept[user], new[user] if fine else rows[user])
    changed = rows.copy()
    changed[0] = other[:OWN]
    again, kept_again, _ = local_total(setup, silent, everybody, changed)
    assert again.tobytes() == delta.tobytes()
    for user in everybody[1:]:
        assert kept_again[user].tobytes() == kept[user].tobytes()

    # Whatever of it they send, it is clipped.
    leaking = updates | {"own": changes, "leak": np.ones(count + 1, bool)}
    for user in everybody:
        contribution, _, _ = local_total(setup, leaking, [user], rows)
        assert np.linalg.norm(contribution) <= clip_norm * (1 + 1e-6)
    result, _, _ = local_total(setup, leaking, everybody, rows)
    for row in (changed, rows):
        remaining, _, _ = local_total(setup, leaking, everybody[1:], row)
        assert np.linalg.norm(result - remaining) <= clip_norm * (1 + 1e-5)


def working_together(power, count):
    """Users within C = 1 of which the first moves the sum by more: excess `count` 2^(power - 24).

    Without the first the sum comes to just below 2^power, with it to just above, where float32 is
    coarser; from there on, little more than half a step is rounded up in one sum, not in the other.
    """
    large = np.r_[np.ones(2**power - 1), 0.5, 1.0]
    return np.r_[1.0, large[:-1], np.full(count, 2.0 ** (power - 24) * 1.001)]


@pytest.mark.parametrize(
    ("values", "most"),
    [
        (np.full(1024, 0.9), 3e-5),
        (np.random.default_rng(0).uniform(0.9, 1.0, 1024), 1e-4),
        (working_together(4, 11), 1.1e-5),
        (working_together(9, 511), 1.6e-2),
    ],
    ids=["1024 alike", "1024 similar", "28 together", "1024 together"],
)
def test_the_rounding_of_many_users(values, most):
    """A limit of float32 sums that is known: by how much removing the first user exceeds it."""
    setup = path("global", "float32", 1, 1)
    updates = {name: np.zeros((len(values) + 1, *s), np.float32) for name, s in SHAPES.items()}
    updates["scale"][:-1] = values
    everybody = np.arange(len(values))
    moved = total(setup, updates, everybody) - total(setup, updates, everybody[1:])
    excess = np.linalg.norm(moved) - np.linalg.norm(total(setup, updates, everybody[:1]))
    assert excess <= most
    assert excess <= len(values) ** 2 * ROUNDING
