"""Attacks on speech: what somebody learns of a user from updates or from the trained model.

A new attack is a module with `attack(target, settings)` and one line below.
"""

from collections.abc import Callable, Sequence

from fedasr.attacks import attribute, inversion, membership, names, speaker
from fedasr.attacks.results import Result as Result
from fedasr.attacks.target import Settings as Settings
from fedasr.attacks.target import Target as Target
from fedasr.attacks.target import load_target as load_target

Attack = Callable[[Target, Settings], Sequence[Result]]
ATTACKS: dict[str, Attack] = {
    "speaker": speaker.attack,
    "attribute": attribute.attack,
    "names": names.attack,
    "membership": membership.attack,
    "inversion": inversion.attack,
}
