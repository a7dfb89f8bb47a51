"""What synthetic corpora there are."""

import dataclasses
from collections.abc import Iterator

from fedasr.data.synthetic.sentences import SENTENCE_MAKERS, SPLITS
from fedasr.errors import UserError


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """What to generate.

    Attributes:
      task: "digits" (3 to 5 spoken digits), "commands" (short home commands, about 100 words) or
        "fresh" (errands of four words: 48 general ones and the `FRESH_WORDS`, absent from "seed").
      seed_users, train_users, dev_users, test_users: number of users of each split.
      seed_utterances, train_utterances, dev_utterances, test_utterances: least and greatest number
        of utterances of a user; users draw theirs uniformly.
      concentration: Dirichlet concentration of a user's mix of digits or topics; small is non-IID.
      seed: of all random choices.

    Raises:
      UserError: for an unknown task, no users, or an impossible range.
    """

    task: str = "digits"
    seed_users: int = 24
    train_users: int = 68
    dev_users: int = 12
    test_users: int = 16
    seed_utterances: tuple[int, int] = (30, 50)
    train_utterances: tuple[int, int] = (30, 60)
    dev_utterances: tuple[int, int] = (8, 16)
    test_utterances: tuple[int, int] = (8, 16)
    concentration: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in SENTENCE_MAKERS:
            raise UserError(f"task must be one of {sorted(SENTENCE_MAKERS)}, not {self.task!r}")
        if not self.concentration > 0:
            raise UserError(f"concentration must be above 0, not {self.concentration}")
        for split in SPLITS:
            users, (low, high) = self.users(split), self.utterances(split)
            if users < 0:
                raise UserError(f"{split}_users must be at least 0, not {users}")
            if not 1 <= low <= high <= 500:
                raise UserError(
                    f"{split}_utterances must be (least, greatest) within 1 to 500, not {low, high}"
                )
        if not any(self.users(split) for split in SPLITS):
            raise UserError("the corpus has no users: raise train_users")

    def users(self, split: str) -> int:
        """Number of users of `split`."""
        return getattr(self, f"{split}_users")

    def utterances(self, split: str) -> tuple[int, int]:
        """Least and greatest number of utterances of a user of `split`."""
        return tuple(getattr(self, f"{split}_utterances"))


def tasks() -> list[str]:
    """What the users of a synthetic corpus may say."""
    return sorted(SENTENCE_MAKERS)


def users_of(config: SyntheticConfig) -> Iterator[tuple[str, str]]:
    """(user, split) pairs; target users are numbered through train, dev and test."""
    numbers = {"seed": 0, "target": 0}
    for split in SPLITS:
        domain = "seed" if split == "seed" else "target"
        for _ in range(config.users(split)):
            yield f"{domain}-{numbers[domain]:03d}", split
            numbers[domain] += 1
