import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedasr.data.corpus import InMemoryCorpus
from fedasr.federated.local import make_layout
from fedasr.models.recogniser import Recogniser
from fedasr.text import CharTokenizer
from fedasr.training import evaluation
from fedasr.training.evaluation import Evaluator

ENCODE = CharTokenizer().encode
# What is said, and what the recogniser below will hear.
USERS = {
    "ann": [("turn on the light", "turn of the light"), ("stop", "stop")],
    "bob": [("play some music", "play music"), ("louder", "loud er"), ("go", "")],
}
BUCKETS = ({"features": 8, "labels": 8}, {"features": 24, "labels": 24})


def corpus():
    return InMemoryCorpus(
        {
            user: [
                {"features": ENCODE(heard).astype(np.float16)[:, None], "labels": ENCODE(said)}
                for said, heard in pairs
            ]
            for user, pairs in USERS.items()
        },
        ragged=("features", "labels"),
    )


def fake(params, batch):
    """Hears what the features spell, with a loss of one nat per frame; "go" cannot be aligned."""
    lengths = batch["features_length"]
    valid = batch["mask"] & (lengths > 0)
    loss = jnp.where(valid, params * lengths, 0.0)
    return batch["features"][..., 0].astype(jnp.int32), lengths, loss, valid


RECOGNISER = Recogniser(init=lambda key: jnp.float32(1), loss=lambda *_: None, evaluate=fake)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 1), (1, 32), (2, 3)])
def test_every_utterance_once_with_the_error_rates_by_hand(devices, batch_size):
    evaluator = Evaluator(RECOGNISER, BUCKETS, batch_size, jax.devices()[:devices])
    pairs = [pair for own in USERS.values() for pair in own]
    references, hypotheses, loss = evaluator.transcripts(jnp.float32(1), corpus())
    assert sorted(zip(references, hypotheses, strict=True)) == sorted(pairs)
    heard = [len(hypothesis) for _, hypothesis in pairs]
    assert loss == pytest.approx(sum(heard) / 4)
    scores = evaluator(jnp.float32(1), corpus())
    # Words: on -> of, "some" lost, louder -> "loud er" (two edits), "go" lost.
    assert scores["wer"] == pytest.approx(100 * 5 / 10)
    # Characters: n -> f, "some " lost, a space, "go" lost.
    characters = sum(len(said) for said, _ in pairs)
    assert scores["cer"] == pytest.approx(100 * (1 + 5 + 1 + 2) / characters)
    assert scores["loss"] == loss


def test_the_published_rate_weighs_utterances_and_leaves_long_ones_out(monkeypatch):
    """By hand: each utterance's rate counts as often as it has words, and two more."""
    evaluator = Evaluator(RECOGNISER, BUCKETS, 4, jax.devices()[:1], published=True)
    # 1/4, 0/1, 1/3, 2/1, 1/1 errors to words.
    parts = [(1 / 4, 6), (0, 3), (1 / 3, 5), (2, 3), (1, 3)]
    expected = sum(rate * weight for rate, weight in parts) / sum(w for _, w in parts)
    found = evaluator(jnp.float32(1), corpus())
    assert found["wer_published"] == pytest.approx(100 * expected)
    assert found["wer"] == pytest.approx(50)
    # "turn of the light" and "play music" last longer than what is left.
    monkeypatch.setattr(evaluation, "_PUBLISHED_FRAMES", 8)
    expected = sum(rate * weight for rate, weight in parts[1::2] + parts[4:]) / 9
    found = evaluator(jnp.float32(1), corpus())
    assert found["wer_published"] == pytest.approx(100 * expected)
    assert evaluation.num_frames(30 * 16_000) == 2998


def test_users_are_evaluated_with_their_own_parameters():
    params = {"cost": jnp.float32(1), "own": jnp.zeros(2)}
    layout = make_layout(params, ("^own$",))

    def evaluate(params, batch):
        return fake(params["cost"] + params["own"][0] + params["own"][1], batch)

    evaluator = Evaluator(
        Recogniser(None, None, evaluate), BUCKETS, 2, jax.devices()[:1], layout=layout
    )
    asked = []

    def rows(users):
        asked.extend(users.tolist())
        return np.stack([10.0 * users, np.ones(len(users))], 1).astype(np.float32)

    references, _, loss = evaluator.transcripts(params, corpus(), rows)
    frames = [sum(len(heard) for _, heard in pairs) for pairs in USERS.values()]
    assert loss * 4 == pytest.approx(2 * frames[0] + 12 * frames[1])  # 1 + own; four are valid
    assert references == evaluator.transcripts(params, corpus())[0]
    assert sorted(user for user in asked if user >= 0) == [0, 0, 1, 1, 1]


def test_utterances_are_known_by_user_and_number():
    """Whatever batches they came in; with the source's metadata where there is any."""
    evaluator = Evaluator(RECOGNISER, BUCKETS, 2, jax.devices()[:1])
    decoded, _ = evaluator.decoded(jnp.float32(1), corpus())
    names = sorted(USERS)
    found = {(names[x.user], x.number): (x.reference, x.hypothesis, x.frames) for x in decoded}
    assert found == {
        (user, i): (said, heard, len(heard))
        for user, pairs in USERS.items()
        for i, (said, heard) in enumerate(pairs)
    }
