"""Which name did a user say? Planted names, looked for in the model that comes out.

Each target has a recording of their own whose transcript is a random name, beside other speech. The
model trains on for some rounds. The attacker has both models, a recording of the target's voice,
and the list of names; they name the one whose loss fell most. (arXiv 2204.08345 masks a name's
part of a recording with noise and reads what the model puts there.)
"""

import numpy as np

from fedasr.attacks.results import Result
from fedasr.attacks.target import Settings, Target, choose_users
from fedasr.attacks.training import Users, multipliers, trained, training_result
from fedasr.streams import Stream, generator

_TOKENS = 6  # of a name
_OTHERS = 2  # other utterances of a target


def planted(target: Target, settings: Settings) -> tuple[Users, list[list[dict]], np.ndarray]:
    """Targets with their names.

    Returns:
      (users' examples, for each user the recording with every candidate name [users][candidates],
      which is the true one, int [users]).
    """
    corpus = target.data.evaluation or {"train": target.data.train}
    held_out = next(iter(corpus.values()))
    chosen = choose_users(held_out, settings.users, settings.seed, _OTHERS + 1)
    rng = generator(Stream.ATTACK, "names", settings.seed)
    vocab = target.data.tokenizer.vocab_size
    users: Users = {}
    lists = []
    truth = rng.integers(settings.candidates, size=len(chosen))
    for user, true in zip(chosen, truth, strict=True):
        examples = held_out.get(user, range(_OTHERS + 1))
        spoken = max(examples, key=lambda example: len(example["features"]))
        names = [
            _name(vocab, rng).astype(spoken["labels"].dtype) for _ in range(settings.candidates)
        ]
        with_name = [{**spoken, "labels": labels} for labels in names]
        others = [example for example in examples if example is not spoken]
        users[f"{len(users):06d}"] = [*others, *[with_name[true]] * len(examples)]
        lists.append(with_name)
    return users, lists, truth


def _name(vocab: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens 1..vocab-1, no two alike in a row, which would need more room."""
    first = rng.integers(vocab - 1, size=1)
    steps = rng.integers(1, vocab - 1, _TOKENS - 1)
    return np.cumsum(np.concatenate([first, steps])) % (vocab - 1) + 1


def attack(target: Target, settings: Settings) -> list[Result]:
    """Names each target's name, by setting."""
    users, lists, truth = planted(target, settings)
    every = [example for candidates in lists for example in candidates]
    before = target.losses(target.params, every).reshape(len(lists), -1)
    presence = np.ones((1, len(users)), bool)
    results = []
    for setting in multipliers(settings):
        (params,) = trained(target, settings, "names", users, presence, setting[1])
        fall = before - target.losses(params, every).reshape(len(lists), -1)
        right = np.where(np.isfinite(fall), fall, -np.inf).argmax(1) == truth
        chance, what = 1 / settings.candidates, f"the name, of {settings.candidates}"
        results.append(training_result(target, settings, "names", setting, right, chance, what))
    return results
