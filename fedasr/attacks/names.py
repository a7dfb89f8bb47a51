"""Which name did a user say? Planted names, looked for in the model that comes out.

Each target says a random name once among a known number of utterances: the longest of these has it
as its transcript. They are alone in the rounds, which is what is left for one who knows all others'
updates. The attacker has the models before and after, the recording, and a list of names; they name
the one whose likelihood rose most. (arXiv 2204.08345 masks a name's part of a recording with noise
and reads what the model puts there.)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedasr.attacks.results import Result
from fedasr.attacks.target import Examples, Settings, Target, choose_users
from fedasr.attacks.training import Users, multipliers, trained, training_result
from fedasr.data.corpus import Corpus
from fedasr.errors import UserError
from fedasr.streams import Stream, generator

_TOKENS = 6  # of a name
RATES = (4, 10)  # one utterance of so many has the name


class Planted(NamedTuple):
    """users: examples of each. candidates: each one's recording with every name on their list.
    true: which was planted. among: how many utterances that was one of."""

    users: Users
    candidates: list[Examples]
    true: list[int]
    among: list[int]


def planted(target: Target, settings: Settings) -> Planted:
    """Targets with their names, for each rate that users have utterances enough for.

    Raises:
      UserError: no two users have enough for any.
    """
    corpora: Sequence[Corpus] = list(target.data.evaluation.values()) or [target.data.train]
    held_out = corpora[0]
    rng = generator(Stream.ATTACK, "names", settings.seed)
    vocab = target.data.tokenizer.vocab_size
    found = Planted({}, [], [], [])
    for among in RATES:
        if (np.asarray(held_out.sizes) >= among).sum() < 2:
            continue
        for user in choose_users(held_out, settings.users, settings.seed, among):
            examples = held_out.get(user, range(among))
            place = max(range(among), key=lambda i: len(examples[i]["features"]))
            spoken, true = examples[place], int(rng.integers(settings.candidates))
            names = [_name(vocab, rng) for _ in range(settings.candidates)]
            candidates = [
                {**spoken, "labels": name.astype(spoken["labels"].dtype)} for name in names
            ]
            examples[place] = candidates[true]
            found.users[f"{len(found.users):06d}"] = examples
            found.candidates.append(candidates)
            found.true.append(true)
            found.among.append(among)
    if not found.users:
        raise UserError(
            f"names: no two held-out users have {min(RATES)} utterances: leave it out of --attacks"
        )
    return found


def _name(vocab: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens 1..vocab-1, no two alike in a row, which would need more room."""
    first = rng.integers(vocab - 1, size=1)
    steps = rng.integers(1, vocab - 1, _TOKENS - 1)
    return np.cumsum(np.concatenate([first, steps])) % (vocab - 1) + 1


def attack(target: Target, settings: Settings) -> list[Result]:
    """Names each target's name, by setting and rate."""
    found = planted(target, settings)
    before = [target.losses(target.params, each) for each in found.candidates]
    alone = np.eye(len(found.users), dtype=bool)
    among, results = np.array(found.among), []
    for setting in multipliers(settings):
        models = trained(target, settings, "names", found.users, alone, setting[1])
        falls: Any = [
            old - target.losses(params, each)
            for params, old, each in zip(models, before, found.candidates, strict=True)
        ]
        falls = np.where(np.isfinite(falls), falls, -np.inf)
        right = falls.argmax(1) == found.true
        for rate in sorted(set(found.among)):
            chance, what = 1 / settings.candidates, f"the name, of {settings.candidates}"
            name, those = f"names 1 in {rate}", right[among == rate]
            results.append(training_result(target, settings, name, setting, those, chance, what))
    return results
