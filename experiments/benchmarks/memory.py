"""What a device needs to train the 130M Conformer: peak memory and bytes, method by method.

    python -m experiments.benchmarks.memory [--size=large|small] [--methods=NAME,...]
        [--plot=FILE.png] [--json]

One client with a batch of 2 utterances of 15 s (arXiv 2408.10443 publishes methods, not settings:
the batch, local steps and share of trained variables are ours). Nothing is trained: each method's
single-client program is compiled for the first device, and the figures are XLA's own. With
--size=large that takes some minutes on a CPU. Dropout is left out: generators of random numbers
take XLA ten times as long to compile as all the rest.

Rows build on each other down to FedSGD; 16-bit storage, online model compression and partial
training each come on top of FedSGD, the last rows have both. Partial training is of matrices that
every user draws, or always of the same variables: attention and all that is small.
`parameters_mb` are the model's
parameters as they lie on the device, `peak_mb` all that is held at the worst time, `down_mb` and
`up_mb` what travels per client and round. MB are 10^6 bytes.
"""

import dataclasses
import sys
import time

from absl import flags

from experiments.benchmarks import plots
from fedasr.cli import common

_SIZE = flags.DEFINE_enum("size", "large", ["large", "small"], "Of the Conformer.")
_SECONDS = flags.DEFINE_float("seconds", 15.0, "Of audio in an utterance.")
_BATCH = flags.DEFINE_integer("batch", 2, "Utterances in a batch.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 4, "Local steps before FedSGD.", lower_bound=2)
_SHARE = flags.DEFINE_float("share", 0.1, "Of the weight matrices that a client trains.")
_METHODS = flags.DEFINE_list("methods", [], "Rows to measure, by name; default all.")
_FIXED = ("attention/", "norm", "bias", "output")  # always trained, paths
_CHARACTERS_PER_SECOND = 14  # of read English


def run() -> None:
    """Compiles, reads and prints."""
    common.configure_devices()
    import jax
    import jax.numpy as jnp
    import optax

    from fedasr.compression import device
    from fedasr.compression.costs import fedsgd_memory
    from fedasr.compression.formats import FloatFormat
    from fedasr.compression.partial import Subset
    from fedasr.compression.transport import entropy_bytes, transport_bytes
    from fedasr.errors import UserError
    from fedasr.federated.client import local_training
    from fedasr.models.conformer import ConformerConfig
    from fedasr.models.recogniser import make_recogniser
    from fedasr.recipes.large_asr import SIZES

    frames = round(100 * _SECONDS.value)
    batch_shapes = {
        "features": ((_BATCH.value, frames, 80), jnp.float32),
        "features_length": ((_BATCH.value,), jnp.int32),
        "labels": ((_BATCH.value, frames * _CHARACTERS_PER_SECOND // 100), jnp.int32),
        "labels_length": ((_BATCH.value,), jnp.int32),
        "mask": ((_BATCH.value,), jnp.bool_),
    }

    def arrays(*leading):
        return {
            name: jax.ShapeDtypeStruct((*leading, *shape), dtype)
            for name, (shape, dtype) in batch_shapes.items()
        }

    def recogniser(remat):
        config = ConformerConfig(**SIZES[_SIZE.value] | {"dropout": 0.0}, remat=remat)
        return make_recogniser("conformer", dataclasses.asdict(config))

    whole, checkpointed = recogniser("none").loss, recogniser("block").loss
    init = recogniser("none").init
    params = jax.eval_shape(init, jax.random.key(0))
    key = jax.eval_shape(lambda: jax.random.key(0))
    bfloat16, omc = FloatFormat.parse("bfloat16"), FloatFormat.parse("S1E3M7")
    user, same = Subset("user", share=_SHARE.value), Subset("fixed", _FIXED)

    def fedavg(loss):
        update = local_training(loss, optax.sgd(0.1))
        steps = _STEPS.value
        return device.measure(
            lambda p, b, k: update(p, b, steps, k, steps), params, arrays(steps), key
        )

    def fedsgd(download=None, upload=None, share=1.0, subset=None):
        return fedsgd_memory(
            checkpointed,
            params,
            arrays(),
            download,
            upload,
            share=share,
            subset=subset,
            grad_clip=1.0,
        )

    by_user, fixed = user.uploaded(params), same.uploaded(params)
    methods = [
        ("baseline: FedAvg", lambda: fedavg(whole), transport_bytes(params)),
        ("+ checkpointing", lambda: fedavg(checkpointed), transport_bytes(params)),
        ("+ FedSGD", lambda: fedsgd(), transport_bytes(params)),
        (
            "FedSGD + 16-bit storage",
            lambda: fedsgd(bfloat16, bfloat16),
            transport_bytes(params, bfloat16, bfloat16, 1.0),
        ),
        (
            "FedSGD + OMC S1E3M7 on 90%",
            lambda: fedsgd(omc, omc, 0.9),
            transport_bytes(params, omc, omc, 0.9),
        ),
        (
            f"FedSGD + {_SHARE.value:.0%} of the matrices trained by user",
            lambda: fedsgd(subset=user),
            transport_bytes(params, uploaded=by_user),
        ),
        (
            "FedSGD + the same variables trained",
            lambda: fedsgd(subset=same),
            transport_bytes(params, uploaded=fixed),
        ),
        (
            "all together (same variables)",
            lambda: fedsgd(omc, omc, 0.9, same),
            transport_bytes(params, omc, omc, 0.9, uploaded=fixed),
        ),
        (
            "all together",
            lambda: fedsgd(omc, omc, 0.9, user),
            transport_bytes(params, omc, omc, 0.9, uploaded=by_user),
        ),
    ]
    if unknown := sorted(set(_METHODS.value) - {name for name, *_ in methods}):
        raise UserError(f"--methods: {unknown} are none of {[name for name, *_ in methods]}")
    rows = []
    for name, measure, transport in methods:
        if _METHODS.value and name not in _METHODS.value:
            continue
        began = time.perf_counter()
        memory = measure()
        rows.append(
            {
                "method": name,
                "parameters_mb": memory.parameters / 1e6,
                "peak_mb": memory.peak / 1e6,
                "down_mb": transport.down / 1e6,
                "up_mb": transport.up / 1e6,
                "compile_seconds": time.perf_counter() - began,
            }
        )
        print(_line(rows[-1]), file=sys.stderr if common.JSON.value else sys.stdout, flush=True)
    if flags.FLAGS.plot:
        draw(rows, flags.FLAGS.plot)
    start = init(jax.random.key(0))
    result = {
        "device": jax.local_devices()[0].device_kind,
        "parameters": sum(x.size for x in jax.tree.leaves(start)),
        "batch_audio_seconds": _BATCH.value * _SECONDS.value,
        "local_steps": _STEPS.value,
        "rows": rows,
        # Of freshly drawn parameters; trained ones are less uniform.
        "entropy_coded_share": entropy_bytes(start, omc)
        / transport_bytes(start, omc, None, 1).down,
    }
    if len(rows) == len(methods):
        first, compressed, together = rows[0], rows[4], rows[-1]
        result |= {
            "omc_parameters_cut": 1 - compressed["parameters_mb"] / first["parameters_mb"],
            "omc_transport_cut": 1 - compressed["down_mb"] / first["down_mb"],
            "peak_ratio": first["peak_mb"] / together["peak_mb"],
            "upload_ratio": first["up_mb"] / together["up_mb"],
        }
    common.show(result if common.JSON.value else {k: v for k, v in result.items() if k != "rows"})


def draw(rows: list[dict], path: str) -> None:
    """Memory and transport of every method."""
    figure, (left, right) = plots.panels(2, 11, 4)
    for axes, keys in ((left, ("parameters", "peak")), (right, ("down", "up"))):
        values = {row["method"]: {key: row[f"{key}_mb"] for key in keys} for row in rows}
        plots.bars(axes, values, "MB")
    right.set_yticklabels([])
    plots.save(figure, path)


def _line(row: dict) -> str:
    figures = "  ".join(
        f"{name} {row[f'{key}_mb']:9,.1f}"
        for name, key in (
            ("parameters", "parameters"),
            ("peak", "peak"),
            ("down", "down"),
            ("up", "up"),
        )
    )
    return f"{row['method']:<44} {figures}  MB"


if __name__ == "__main__":
    plots.define_flag()
    common.main(run)
