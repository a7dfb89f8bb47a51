"""The work that all peers do, and how they are told to: numpy only, for it runs in every one's own
environment.

A worker is started as `python with_X.py JSON` with the fields of `Work`. When it has done every
kind of round twice it prints "ready", and from then on a line for each line that it reads: the name
of a kind of round, which it has done by then.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np

KINDS = ("uniform", "ragged")


@dataclass(frozen=True)
class Work:
    """Federated averaging of a CTC Transformer with plain SGD on the clients.

    clients: in a round. batch: utterances of a step. steps: of a client in a uniform round; in a
    ragged one clients have 1 to 16. frames, labels: of an utterance. dim, mlp, blocks, heads: of
    the model. part, parts: this worker does the work of clients part, part + parts, ...
    mode: what the worker makes of it.
    """

    clients: int = 32
    batch: int = 2
    steps: int = 4
    frames: int = 200
    labels: int = 20
    dim: int = 144
    mlp: int = 576
    blocks: int = 4
    heads: int = 4
    part: int = 0
    parts: int = 1
    mode: str = ""

    def client_steps(self, kind: str) -> list[int]:
        """Steps of each client in a round, of all parts."""
        if kind == "uniform":
            return [self.steps] * self.clients
        return [1 + i * 15 // max(self.clients - 1, 1) for i in range(self.clients)]

    def own(self, kind: str) -> dict[int, int]:
        """{client: steps} of this part."""
        return dict(list(enumerate(self.client_steps(kind)))[self.part :: self.parts])

    def data(self, client: int, steps: int) -> dict[str, np.ndarray]:
        """A client's utterances: features float32 [n, frames, 80], labels int32 [n, labels]."""
        rng = np.random.default_rng(client)
        count = steps * self.batch
        return {
            "features": rng.standard_normal((count, self.frames, 80), np.float32),
            "labels": rng.integers(1, 30, (count, self.labels)).astype(np.int32),
        }


def parse(text: str) -> Work:
    """The work that a worker was started with."""
    known = {field.name for field in fields(Work)}
    return Work(**{name: value for name, value in json.loads(text).items() if name in known})


def serve(rounds: Mapping[str, Callable[[], object]]) -> None:
    """Does the rounds that are asked for, until stdin ends."""
    for _ in range(2):
        for round in rounds.values():
            round()
    print("ready", flush=True)
    for line in sys.stdin:
        rounds[line.strip()]()
        print("done", flush=True)
