"""What clients of an adapted model send, and what a device holds for a chunk of them, by kind.

    python -m experiments.benchmarks.adaptation [--dim=768 --blocks=12 --mlp=3072]
        [--kinds=full,ffa_lora,...] [--chunks=1,8] [--seconds=5] [--json]

A Transformer of wav2vec 2.0 base's size, unless told otherwise. Nothing is trained: the program of
a chunk of vmapped clients, two local steps on one utterance each, is compiled for the first device,
and the figures are XLA's own. `parameters_mb` are all of the model's as they lie there, `trained`
so many numbers, `up_mb` what a client sends; `held_mb_N` is what N clients need at the worst time
beside the parameters and their data: activations, and whatever is copied for each client. MB are
10^6 bytes.
"""

import math

from absl import flags

from fedasr.cli import common

_DIM = flags.DEFINE_integer("dim", 768, "Of the model.")
_BLOCKS = flags.DEFINE_integer("blocks", 12, "Of the model.")
_MLP = flags.DEFINE_integer("mlp", 3072, "Units between the dense layers of a block.")
_KINDS = flags.DEFINE_list("kinds", [], "Of adaptation; default all.")
_CHUNKS = flags.DEFINE_list("chunks", ["1", "8"], "Clients that are computed together.")
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Of audio in an utterance.")
_RANK = flags.DEFINE_integer("rank", 8, "Of factors.")


def run() -> None:
    """Compiles, reads and prints."""
    import jax
    import jax.numpy as jnp
    import optax

    from fedasr.compression import costs
    from fedasr.compression.partial import Subset, partial_training
    from fedasr.federated.client import local_training
    from fedasr.models import peft
    from fedasr.models.recogniser import make_recogniser

    frames = round(100 * _SECONDS.value)
    shapes = {
        "features": ((1, frames, 80), jnp.float16),
        "features_length": ((1,), jnp.int32),
        "labels": ((1, frames // 8), jnp.int32),
        "labels_length": ((1,), jnp.int32),
        "mask": ((1,), jnp.bool_),
    }
    options = {"dim": _DIM.value, "blocks": _BLOCKS.value, "mlp": _MLP.value}
    options |= {"heads": math.gcd(_DIM.value, 12), "dropout": 0.0, "layer_drop": 0.0}
    base = make_recogniser("transformer", options)

    def measure(kind: str, frozen_dtype: str) -> dict[str, object]:
        config = peft.PeftConfig(kind=kind, rank=_RANK.value, frozen_dtype=frozen_dtype)
        recogniser = peft.adapt(base, config)
        params = jax.eval_shape(recogniser.init, jax.random.key(0))
        patterns = peft.trained_patterns(config)
        subset = None if patterns is None else Subset("fixed", patterns)

        def make(loss):
            return local_training(loss, optax.sgd(0.1))

        loss = recogniser.loss
        update = make(loss) if subset is None else partial_training(make, loss, subset)

        def of_chunk(params, batches, keys):
            def one(batches, key):
                return update(params, batches, jnp.int32(2), key, jnp.int32(2))[0]

            return jax.tree.map(lambda x: x.sum(0), jax.vmap(one)(batches, keys))

        trained = None if subset is None else subset.trained(params)
        sent = costs.sent_size(params, trained)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
        row: dict[str, object] = {
            "kind": kind,
            "frozen": frozen_dtype,
            "parameters_mb": size / 1e6,
            "trained": sent,
            "up_mb": 4 * sent / 1e6,
        }
        for chunk in map(int, _CHUNKS.value):
            batches = {
                name: jax.ShapeDtypeStruct((chunk, 2, *shape), dtype)
                for name, (shape, dtype) in shapes.items()
            }
            keys = jax.eval_shape(lambda n=chunk: jax.random.split(jax.random.key(0), n))
            compiled = jax.jit(of_chunk).lower(params, batches, keys).compile()
            row[f"held_mb_{chunk}"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
        return row

    kinds = _KINDS.value or list(peft.KINDS)
    rows = [measure(kind, "float32") for kind in kinds]
    rows += [measure(kind, "bfloat16") for kind in kinds if kind == "ffa_lora"]
    common.show({"rows": rows})


if __name__ == "__main__":
    common.main(run)
