"""Federated rounds of the published 255M-parameter model on random features.

    python -m experiments.benchmarks.large [--chunk=N] [--json]

A round of arXiv 2310.00098: 16 users, 10 local steps of 120 s of audio each (8 utterances of 15 s),
bfloat16 compute, per-layer clipping, noise, server LAMB. Without a GPU or TPU the same program runs
one round of a shrunken model and says so ("shrunken": true).

JSON: `seconds_per_round` (median), `client_steps_per_second`, `audio_seconds_per_second`,
`peak_memory_mb` (of the device; on a CPU resident memory of the process), `model_flops_per_step`
(forward and backward passes by the formula in `step_flops`), `model_flop_utilisation` (null where
the device's peak is unknown), and the setting.
"""

import statistics
import sys
from typing import Any

from absl import flags

from experiments.benchmarks.workload import RandomSpeech, peak_rss_mb
from fedasr.cli import common

_MODEL = flags.DEFINE_string("model", "base", "A published size; see fedasr.recipes.shared.")
_COHORT = flags.DEFINE_integer("cohort", 16, "Users in a round.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 10, "Local steps.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 15.0, "Of audio in an utterance.")
_BATCH = flags.DEFINE_integer("batch", 8, "Utterances in a batch.", lower_bound=1)
_CHUNK = flags.DEFINE_integer("chunk", 1, "Users vmapped together on a device.", lower_bound=1)
_SCAN = flags.DEFINE_bool("scan_blocks", False, "Compile one block and run all through it.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds timed, after one that compiles.", lower_bound=1)

# bfloat16 matrix products per second and device, dense, from the makers' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}
_SHRUNKEN = {"dim": 64, "mlp": 256, "blocks": 1}
_CHARACTERS_PER_SECOND = 14  # of read English


def step_flops(options: dict[str, Any], frames: int, utterances: int) -> float:
    """Model FLOPs of one training step: 3 times the forward pass's matrix products.

    Args:
      options: `dim`, `mlp`, `blocks` and, where they differ from the defaults, `kernel`, `stride`,
        `features` and `vocab` of the Transformer.
      frames: feature frames of each utterance.
      utterances: in the batch.
    """
    d, out = options["dim"], -(-frames // options.get("stride", 3))
    front = options.get("kernel", 7) * options.get("features", 80) * 2 * d
    block = 4 * d * d + 2 * d * options["mlp"] + 2 * out * d
    per_frame = front + options["blocks"] * block + d * options.get("vocab", 30)
    return 3 * 2 * per_frame * out * utterances


def peak_flops(kind: str) -> float | None:
    """Peak FLOPs per second of a device kind, by the longest matching name; None if unknown."""
    names = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def run() -> None:
    """Measures and prints."""
    common.configure_devices()
    import jax
    import optax

    from fedasr.data.batching import Batching, make_buckets
    from fedasr.errors import UserError
    from fedasr.federated.algorithms.fedavg import FedAvg
    from fedasr.federated.client import local_training
    from fedasr.federated.hardware import Hardware
    from fedasr.federated.simulation import Simulation
    from fedasr.models.recogniser import make_recogniser
    from fedasr.privacy.mechanism import Mechanism
    from fedasr.privacy.sampling import FixedSizeSampler
    from fedasr.recipes.shared import MODELS

    if _MODEL.value not in MODELS:
        raise UserError(f"--model={_MODEL.value!r}: choose one of {', '.join(MODELS)}")
    device = jax.local_devices()[0]
    shrunken = device.platform == "cpu"
    options = MODELS[_MODEL.value] | {"heads": 4, "dropout": 0.3, "cape_shift": 30.0}
    options |= {"scan_blocks": _SCAN.value}
    cohort, steps, frames = _COHORT.value, _STEPS.value, round(100 * _SECONDS.value)
    batch, rounds = _BATCH.value, _ROUNDS.value
    if shrunken:
        print("no GPU or TPU: one round of a shrunken model", file=sys.stderr)
        options |= _SHRUNKEN
        cohort, steps, frames, batch, rounds = min(cohort, 2), min(steps, 2), 300, 2, 1
    recogniser = make_recogniser("transformer", options | {"dtype": "bfloat16"})
    corpus = RandomSpeech(
        [steps * batch] * cohort, frames, labels=frames * _CHARACTERS_PER_SECOND // 100
    )
    simulation = Simulation(
        corpus,
        Mechanism(0.01, "dim", 1e-5 * cohort, FixedSizeSampler(cohort, cohort, seed=0)),
        FedAvg(
            local_training(recogniser.loss, optax.sgd(0.2)),
            optax.lamb(0.002, eps=1e-6),
        ),
        Batching(batch, steps=steps, buckets=make_buckets([corpus])),
        hardware=Hardware(chunk=_CHUNK.value),
    )
    params = recogniser.init(jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params))
    state = simulation.init(params)
    del params
    seconds: list[float] = []

    def measured() -> None:
        nonlocal state
        for new, metrics in simulation.run(state, rounds + 1):
            state = new
            seconds.append(metrics.seconds)

    resident = peak_rss_mb(measured)
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    devices = len(jax.local_devices())
    per_round = statistics.median(seconds[1:])
    flops = step_flops(options, frames, batch)
    rate, limit = cohort * steps / per_round, peak_flops(device.device_kind)
    common.show(
        {
            "device": f"{devices} x {device.device_kind}",
            "shrunken": shrunken,
            "parameters": count,
            "cohort": cohort,
            "steps": steps,
            "batch_audio_seconds": batch * frames / 100,
            "chunk": _CHUNK.value,
            "scan_blocks": _SCAN.value,
            "seconds_per_round": per_round,
            "first_round_seconds": seconds[0],
            "client_steps_per_second": rate,
            "audio_seconds_per_second": rate * batch * frames / 100,
            "peak_memory_mb": resident if peak is None else peak / 2**20,
            "model_flops_per_step": flops,
            "model_flop_utilisation": rate * flops / (limit * devices) if limit else None,
        }
    )


if __name__ == "__main__":
    common.main(run)
