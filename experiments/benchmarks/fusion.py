"""How close an evaluation of M2N2 comes to the scoring that it must do.

    python -m experiments.benchmarks.fusion [--json]

The workload: scikit-learn's digits from scratch, an archive of 20 models of 19,210 parameters,
1,437 data points. In one process, in turns, one seed on one device:

* bound: the child's forward pass alone, scanned;
* step, step_no_mutation: whole steps of M2N2 as `fedasr.fusion.run` runs them, with the published
  mutation (from scratch) and without (merging trained models);
* python_loop: the same step as a Python loop that draws parents op by op on the device, calls one
  compiled crossover and one compiled forward pass, updates the archive op by op and tests the best
  model every step.

Figures are evaluations per second, the best of the repetitions: other processes only make them
slower. `cpu` are CPU microseconds of an evaluation, `cpu_share_of_bound` is their ratio, which a
busy machine disturbs less. `seeds`: ten seeds on all devices, in total.
"""

import time

from absl import flags

from fedasr.cli import common

_REPEATS = flags.DEFINE_integer("repeats", 5, "Repetitions of each figure.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 200, "Evaluations of a repetition.", lower_bound=1)
_LOOP_STEPS = flags.DEFINE_integer("loop_steps", 20, "Of the Python loop.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 10, "Seeds side by side.", lower_bound=1)


def run() -> None:
    """Measures and prints."""
    common.configure_devices()
    import dataclasses

    import jax

    from fedasr.fusion import archive as archives
    from fedasr.fusion import competition, digits, methods
    from fedasr.fusion.crossover import crossover
    from fedasr.fusion.run import run as run_seeds

    data = digits.load()
    score, test = digits.train_scores(data), digits.test_accuracy(data)
    evolution = methods.Evolution()
    whole = methods.evolve(score, evolution)
    merging = methods.evolve(score, dataclasses.replace(evolution, mutation=0.0))
    key = jax.random.key(0)
    state = jax.jit(whole.init)(digits.scratch_parents(key), key)
    size = sum(x[0].size for x in jax.tree.leaves(state.params))

    @jax.jit
    def bound(params, count):
        def body(i, p):
            # The next pass depends on this one, so that none is left out.
            return jax.tree.map(lambda x: x + 1e-9 * score(p).sum(), p)

        return jax.lax.fori_loop(0, count, body, params)

    def scanned(method):
        @jax.jit
        def steps(state, count):
            def body(i, s):
                return method.step(s, jax.random.fold_in(key, i), i)

            return jax.lax.fori_loop(0, count, body, state)

        return steps

    forward, accuracy = jax.jit(score), jax.jit(test)
    merge = jax.jit(lambda a, b, w, s: crossover(a, b, w, s, (0, 0, 0, 0)))
    mutate = jax.jit(lambda p, k: methods.mutate(p, k, evolution.mutation))

    def python_loop(state, count):
        for i in range(count):
            keys = jax.random.split(jax.random.fold_in(key, i), 5)
            fit = competition.fitness(state.scores)
            slots = fit.shape[0]
            a = jax.random.choice(keys[0], slots, p=fit / fit.sum())
            gains = competition.attraction(state.scores, a)
            b = jax.random.choice(keys[1], slots, p=gains / gains.sum())
            ratio = jax.random.uniform(keys[2], (1,))
            split = jax.random.randint(keys[3], (1,), 0, size)
            child = merge(archives.take(state, a), archives.take(state, b), ratio, split)
            child = mutate(child, keys[4])
            scores = forward(child)
            slot = archives.loser(state.scores, state.filled, scores)
            if int(slot) < slots:
                state = archives.replace(state, slot, child, scores)
            float(accuracy(archives.take(state, archives.best(state)))["test_accuracy"])
        return state

    steps, few = _STEPS.value, _LOOP_STEPS.value
    one = archives.take(state, 0)
    tasks = {
        "bound": (steps, lambda: bound(one, steps)),
        "step": (steps, lambda: step(state, steps)),
        "step_no_mutation": (steps, lambda: merge_step(state, steps)),
        "python_loop": (few, lambda: python_loop(state, few)),
    }
    step, merge_step = scanned(whole), scanned(merging)
    seconds = {name: [] for name in tasks}
    cpu = {name: [] for name in tasks}
    for repeat in range(_REPEATS.value + 1):
        for name, (count, task) in tasks.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            jax.block_until_ready(task())
            if repeat:  # the first compiles
                seconds[name].append((time.perf_counter() - began) / count)
                cpu[name].append((time.process_time() - cpu_began) / count)
    speed = {name: 1 / min(values) for name, values in seconds.items()}
    many = run_seeds(whole, digits.scratch_parents, range(_SEEDS.value), steps, every=steps)

    devices = jax.local_devices()
    common.show(
        {
            **speed,
            "share_of_bound": speed["step"] / speed["bound"],
            "share_of_bound_no_mutation": speed["step_no_mutation"] / speed["bound"],
            "times_python_loop": speed["step"] / speed["python_loop"],
            "cpu": {name: 1e6 * min(values) for name, values in cpu.items()},
            "cpu_share_of_bound": min(cpu["bound"]) / min(cpu["step"]),
            "seeds": {"count": _SEEDS.value, "evaluations_per_second": many.timed / many.seconds},
            "device": f"{len(devices)} x {devices[0].device_kind}",
            "parameters": size,
        }
    )


if __name__ == "__main__":
    common.main(run)
