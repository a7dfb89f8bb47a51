"""What did the sender say it like? Features recovered from the update of one step on one utterance.

The attacker knows the transcript and the length and looks for features whose gradient points where
the update does (Zhu, Liu and Han, Deep Leakage from Gradients, arXiv 1906.08935, with the cosine of
arXiv 2003.14053; for speech arXiv 2104.07815). Success is the share of utterances that the features
found resemble more than any other target's: by correlation, every bin without its mean.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedasr.attacks.matching import releases, result
from fedasr.attacks.results import Result
from fedasr.attacks.target import Settings, Target, choose_users
from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.models.recogniser import ARRAYS
from fedasr.streams import Stream, generator

_MOST = 6  # targets: each is hundreds of gradients
_STEPS, _RATE = 120, 0.1
_FRAMES, _LABELS = 48, 8  # targets are padded to multiples of these: programs are compiled for each


def attack(target: Target, settings: Settings) -> list[Result]:
    """Names the utterance of each update, by setting."""
    if target.recogniser.scores is None:
        raise UserError("inversion needs a model trained with CTC: leave it out of --attacks")
    one_step = dataclasses.replace(target.config.client, steps=1, epochs=0, batch_seconds=0.0)
    target = dataclasses.replace(target, config=dataclasses.replace(target.config, client=one_step))
    train = target.data.train
    chosen = choose_users(train, min(settings.users, _MOST), settings.seed, least=1)
    said = [min(_some(train, user), key=lambda x: len(x["features"])) for user in chosen]
    corpus = InMemoryCorpus({f"{i:06d}": [x] for i, x in enumerate(said)}, ragged=ARRAYS)
    updates = target.updates(corpus, "one step")
    search = _searcher(target)
    truth = [np.asarray(x["features"], np.float32) for x in said]
    once = dataclasses.replace(settings, draws=1)
    results = []
    for release in releases(target, once, updates):
        found = [
            search(seen, example, settings.seed)
            for seen, example in zip(release.seen[0], said, strict=True)
        ]
        right = np.array(
            [int(np.argmax([likeness(x, y) for y in truth])) == i for i, x in enumerate(found)]
        )
        what = f"the utterance named among {len(said)}"
        results.append(result(target, "inversion", release, right, 1 / len(said), what))
    return results


def _some(corpus: Any, user: int) -> list[Any]:
    return corpus.get(user, range(min(4, int(corpus.sizes[user]))))


def likeness(found: np.ndarray, true: np.ndarray) -> float:
    """Correlation over the frames that both have, [frames, bins], each bin without its mean."""
    frames = min(len(found), len(true))
    a, b = (x[:frames] - x[:frames].mean(0) for x in (found, true))
    return float((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def _searcher(target: Target) -> Any:
    """From an update, the example whose transcript is known, and a seed to features."""
    scores: Any = target.recogniser.scores
    params = target.params

    def gradient(features: jax.Array, batch: dict) -> jax.Array:
        def loss(params):
            logits, lengths, *_ = scores(params, batch | {"features": features[None]})
            frames = jnp.arange(logits.shape[1])[None] >= lengths[:, None]
            places = jnp.arange(batch["labels"].shape[1])[None] >= batch["labels_length"][:, None]
            return optax.ctc_loss(logits, frames * 1.0, batch["labels"], places * 1.0).mean()

        leaves = jax.tree.leaves(jax.grad(loss)(params))
        return jnp.concatenate([leaf.ravel() for leaf in leaves])

    def distance(features, seen, batch):
        found = gradient(features, batch)
        return 1 - found @ seen / (jnp.linalg.norm(found) * jnp.linalg.norm(seen) + 1e-12)

    optimizer = optax.adam(_RATE)

    @jax.jit
    def step(features, state, seen, batch):
        towards = jax.grad(distance)(features, seen, batch)
        updates, state = optimizer.update(towards, state)
        return optax.apply_updates(features, updates), state

    def search(seen: np.ndarray, example: Any, seed: int) -> np.ndarray:
        frames, tokens = len(example["features"]), len(example["labels"])
        room = -(-frames // _FRAMES) * _FRAMES
        labels = np.zeros((1, -(-tokens // _LABELS) * _LABELS), np.int32)
        labels[0, :tokens] = example["labels"]
        batch = {
            "labels": labels,
            "labels_length": np.array([tokens], np.int32),
            "features_length": np.array([frames], np.int32),
            "mask": np.ones(1, bool),
        }
        rng = generator(Stream.ATTACK, "inversion", seed)
        shape = (room, example["features"].shape[1])
        features = jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32)
        state = optimizer.init(features)
        for _ in range(_STEPS):
            features, state = step(features, state, jnp.asarray(seen), batch)
        return np.asarray(features)[:frames]

    return search
