"""Stages that measure something of ours alone, a row of figures at a time.

    python -m experiments.benchmarks.device.stages --stage=device|correctness|ctc|attention|chunk
        [--tiny]

Each row is a line of JSON on stdout. `experiments.benchmarks.device` starts them.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from fedasr.cli import common

_REPEATS = 20
# Utterances vmapped clients have, frames, labels: of the 255M model, and of small clients.
_CTC = {"8 x 500 x 210": (1, 8, 500, 210), "32 clients x 2 x 67 x 20": (32, 2, 67, 20)}
# Clients, utterances, frames, heads, features of a head.
_ATTENTION = {
    "8 x 500 x 4 x 192": (1, 8, 500, 4, 192),
    "8 clients x 2 x 500 x 4 x 64": (8, 2, 500, 4, 64),
}


def device(tiny: bool) -> Iterator[dict[str, Any]]:
    """What is there."""
    import jax

    found = jax.local_devices()
    stats = found[0].memory_stats() or {}
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    yield {
        "kind": found[0].device_kind,
        "platform": found[0].platform,
        "devices": len(found),
        "memory_gb": stats["bytes_limit"] / 1e9 if "bytes_limit" in stats else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def correctness(tiny: bool) -> Iterator[dict[str, Any]]:
    """A round of each mode beside what a CPU made of it."""
    import jax

    from experiments.benchmarks.device import goldens

    names = goldens.NAMES[:2] if tiny else goldens.NAMES
    yield from goldens.rows(names, jax.local_devices()[0], min(8, os.cpu_count() or 1))


def ctc(tiny: bool) -> Iterator[dict[str, Any]]:
    """Loss and gradient of CTC as a step has them, and by optax's."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from fedasr.kernels.ctc import ctc_loss

    def padding(lengths: Any, size: int) -> Any:
        return (jnp.arange(size) >= lengths[:, None]).astype(jnp.float32)

    def by_optax(logits: Any, frames: Any, labels: Any, counts: Any) -> Any:
        unused = padding(frames, logits.shape[1]), padding(counts, labels.shape[1])
        return jnp.sum(optax.ctc_loss(logits, unused[0], labels, unused[1]))

    def ours(*args: Any) -> Any:
        return jnp.sum(ctc_loss(*args)[0])

    sizes = {"2 x 12 x 3": (1, 2, 12, 3)} if tiny else _CTC
    for name, (clients, batch, frames, most) in sizes.items():
        rng = np.random.default_rng(0)
        logits = rng.standard_normal((clients, batch, frames, 30), np.float32)
        labels = rng.integers(1, 30, (clients, batch, most))
        lengths = np.full((clients, batch), frames), np.full((clients, batch), most)
        args = (logits, lengths[0], labels, lengths[1])
        functions = {
            key: jax.jit(jax.vmap(jax.value_and_grad(f)))
            for key, f in (("ours", ours), ("optax", by_optax))
        }
        found = {key: jax.device_get(f(*args)) for key, f in functions.items()}
        apart = [
            float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
            for a, b in zip(found["ours"], found["optax"], strict=True)
        ]
        yield {
            "size": name,
            "ms": 1e3 * _seconds(functions["ours"], args),
            "ms of optax's": 1e3 * _seconds(functions["optax"], args),
            "loss apart": apart[0],
            "gradient apart": apart[1],
            "ok": bool(max(apart) < 1e-3),
        }


def attention(tiny: bool) -> Iterator[dict[str, Any]]:
    """Attention and its derivatives in bfloat16: fused, and by way of all scores."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fedasr.kernels.attention import attention as plain
    from fedasr.kernels.attention import fused_attention

    def total(f: Callable[..., Any]) -> Callable[..., Any]:
        def whole(q: Any, k: Any, v: Any, mask: Any) -> Any:
            return jnp.sum(jnp.sin(f(q, k, v, mask).astype(jnp.float32)) * mask[..., None, None])

        return jax.jit(jax.vmap(jax.value_and_grad(whole, (0, 1, 2))))

    ways = {"fused": fused_attention, "plain": lambda *args: plain(*args, None)}
    sizes = {"2 x 16 x 2 x 8": (1, 2, 16, 2, 8)} if tiny else _ATTENTION
    for name, (clients, batch, frames, heads, width) in sizes.items():
        rng = np.random.default_rng(0)
        shape = (3, clients, batch, frames, heads, width)
        q, k, v = jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)
        inside = np.arange(frames) < rng.integers(frames // 2, frames + 1, (clients, batch, 1))
        args = (q, k, v, jnp.asarray(inside))
        functions = {key: total(f) for key, f in ways.items()}
        found = {key: jax.device_get(f(*args)[1]) for key, f in functions.items()}
        apart = max(
            float(np.linalg.norm(np.float32(a) - np.float32(b)) / np.linalg.norm(np.float32(b)))
            for a, b in zip(found["fused"], found["plain"], strict=True)
        )
        memory = {
            key: f.lower(*args).compile().memory_analysis().temp_size_in_bytes / 1e6
            for key, f in functions.items()
        }
        yield {
            "size": name,
            "ms": 1e3 * _seconds(functions["fused"], args),
            "ms by all scores": 1e3 * _seconds(functions["plain"], args),
            "MB": memory["fused"],
            "MB by all scores": memory["plain"],
            "gradients apart": apart,
            "ok": bool(apart < 0.02),  # of numbers with 8 bits
        }


def chunk(tiny: bool) -> Iterator[dict[str, Any]]:
    """What `chunk="auto"` chooses, and the memory that a round then takes."""
    import jax

    from experiments.benchmarks.device import simulations
    from experiments.benchmarks.workload import RandomSpeech
    from fedasr.federated import chunks

    dim, blocks, cohort, frames = (16, 1, 2, 24) if tiny else (144, 4, 256, 200)
    config = simulations.configuration(
        {
            "cohort": cohort,
            "privacy.sampler": "fixed",
            "privacy.deployments": (),
            "client.steps": 1 if tiny else 4,
            "client.batch_size": 2,
            "model.options": {"dim": dim, "blocks": blocks, "heads": 4, "mlp": 4 * dim},
        }
    )
    there = jax.local_devices()[:1]
    train = RandomSpeech([8] * 2 * cohort, frames)
    budget = chunks.device_budget(there)
    began = time.perf_counter()
    simulation = simulations.make(config, train, there)
    chosen = time.perf_counter() - began
    params = simulations.parameters(config)
    needed = simulation.chunk_bytes(params)
    state, seconds = simulation.init(params, simulations.ROOT), []
    for _, metrics in simulation.run(state, 3):
        seconds.append(metrics.seconds)
    stats = there[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    yield {
        "chunk": simulation.chunk,
        "cohort": cohort,
        "chosen in s": chosen,
        "GB to use": None if budget is None else budget / 1e9,
        "GB estimated": needed / 1e9,
        "GB at the peak": None if peak is None else peak / 1e9,
        "seconds a round": statistics.median(seconds[1:]),
        "ok": bool(budget is None or peak is None or peak <= budget / chunks.SHARE),
    }


def _seconds(function: Callable[..., Any], args: Any) -> float:
    """Of a call, in the median of some, after the first."""
    import jax

    args = jax.device_put(args)
    jax.block_until_ready(function(*args))
    found = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        found.append(time.perf_counter() - began)
    return statistics.median(found)


STAGES = {f.__name__: f for f in (device, correctness, ctc, attention, chunk)}


def run() -> None:
    """Runs a stage and prints its rows."""
    from fedasr.training.logging import to_json

    for row in STAGES[flags.FLAGS.stage](flags.FLAGS.tiny):
        print(json.dumps(to_json(row), allow_nan=False), flush=True)


if __name__ == "__main__":
    flags.DEFINE_enum("stage", None, list(STAGES), "What to measure.", required=True)
    flags.DEFINE_bool("tiny", False, "Sizes that a CPU does in seconds.")
    common.main(run)
