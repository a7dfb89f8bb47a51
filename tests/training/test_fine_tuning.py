"""Users' own models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.data.corpus import InMemoryCorpus
from fedasr.errors import UserError
from fedasr.models.recogniser import recogniser
from fedasr.text import CharTokenizer
from fedasr.training.evaluation import Evaluator, evaluation_buckets
from fedasr.training.fine_tuning import evaluate_fine_tuned, fine_tuned

RNG = np.random.default_rng(0)


def speech(users, utterances):
    labels = CharTokenizer().encode("ab")
    return InMemoryCorpus(
        {
            user: [
                {"features": RNG.normal(size=(24, 80)).astype(np.float32), "labels": labels}
                for _ in range(utterances)
            ]
            for user in users
        },
        ragged=("features", "labels"),
    )


@pytest.fixture(scope="module")
def model():
    made = recogniser("transformer", dim=8, blocks=1, heads=1, mlp=8, dropout=0.0)
    return made, made.init(jax.random.key(0))


def test_each_user_adapts_alone_and_from_the_common_model(model):
    made, params = model
    corpus = speech("ab", 2)
    models = dict(fine_tuned(made, params, corpus, rate=0.1, epochs=2, batch_size=2, grad_clip=1e9))
    assert sorted(models) == [0, 1]
    for user, own in models.items():
        examples = corpus.get(user, [0, 1])
        batch = {
            name: jnp.stack([x[name] for x in examples]) for name in ("features", "labels")
        } | {"mask": jnp.ones(2, bool)}
        batch |= {
            f"{name}_length": jnp.full(2, batch[name].shape[1], jnp.int32)
            for name in ("features", "labels")
        }
        by_hand = params
        for _ in range(2):
            grads = jax.grad(lambda p: made.loss(p, batch, jax.random.key(0))[0])(by_hand)  # noqa: B023
            by_hand = jax.tree.map(lambda w, g: w - 0.1 * g, by_hand, grads)
        for one, other, start in zip(*map(jax.tree.leaves, (own, by_hand, params)), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)
            del start
    assert not np.allclose(*(jax.tree.leaves(models[u])[0] for u in (0, 1)))


def test_users_are_found_by_name(model):
    made, params = model
    adapted, held_out = speech("abc", 1), speech("ca", 2)
    evaluator = Evaluator(made, evaluation_buckets([held_out]), 2)
    found = evaluate_fine_tuned(evaluator, made, params, adapted, held_out, rate=0.1)
    assert sorted((x.user, x.number) for x in found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {x.reference for x in found} == {"ab"}
    with pytest.raises(UserError, match="user 'c' has no speech to adapt to"):
        evaluate_fine_tuned(evaluator, made, params, speech("ab", 1), held_out, rate=0.1)
