"""n-best lists rescored by a causal language model, as published for neural decoders.

An n-gram model searches, a large model judges: the text with the highest

    alpha x new + (1 - alpha) x old + acoustic_scale x acoustic

is taken, where new and old are log probabilities by the causal and the n-gram model (Willett et
al., 2023; CORP, whose program takes GPT-2 XL, ten texts, alpha 1 and a scale of 0.5).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedasr.decoding.beam import Hypothesis
from fedasr.errors import UserError

# From texts to their log probabilities, in nats.
TextScorer = Callable[[Sequence[str]], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class RescoringConfig:
    """Defaults are CORP's.

    nbest: texts that are judged. alpha: the causal model's share. acoustic_scale: times the
    acoustic log probability.
    """

    nbest: int = 10
    alpha: float = 1.0
    acoustic_scale: float = 0.5

    def __post_init__(self) -> None:
        if self.nbest < 1 or not 0 <= self.alpha <= 1 or not self.acoustic_scale >= 0:
            raise UserError(
                "rescoring: nbest must be positive, alpha in [0, 1], acoustic_scale at least 0"
            )


class Rescored(NamedTuple):
    """text: the best, "" where there was none. confidence: its share of all texts' probability."""

    text: str
    confidence: float


def rescore(
    hypotheses: Sequence[Hypothesis], scorer: TextScorer, config: RescoringConfig | None = None
) -> Rescored:
    """The best of several hypotheses by a causal language model.

    Args:
      hypotheses: of `BeamDecoder.best`; of these the first `nbest` that say something.
      scorer: such as a `CausalScorer`.
      config: default CORP's.
    """
    config = config or RescoringConfig()
    said = [h for h in hypotheses if h.text][: config.nbest]
    if not said:
        return Rescored("", 0.0)
    new = scorer([h.text for h in said])
    totals = [
        config.alpha * score + (1 - config.alpha) * h.language + config.acoustic_scale * h.acoustic
        for score, h in zip(new, said, strict=True)
    ]
    best = max(range(len(said)), key=totals.__getitem__)
    share = sum(math.exp(total - totals[best]) for total in totals)
    return Rescored(said[best].text, 1 / share)


class CausalScorer:
    """Log probabilities of texts by a causal language model of Hugging Face `transformers`.

    As published, the first token of a text is given, not judged.

    Args:
      path: a folder that `save_pretrained` wrote, with its tokenizer, or a model's name, which
        `transformers` looks for in its cache and downloads.
      batch_size: texts at a time.

    Raises:
      UserError: transformers or PyTorch is missing, or there is no such model.
    """

    def __init__(self, path: str | Path, batch_size: int = 16) -> None:
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise UserError(
                f"a causal language model needs {error.name}: pip install 'fedasr[rescoring]'"
            ) from None
        self._torch, self._batch_size = torch, batch_size
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            self._model = AutoModelForCausalLM.from_pretrained(path).eval()
        except (OSError, ValueError, KeyError) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(f"no causal language model in {path}: {said}") from error

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """The log probability of each text, in nats."""
        found: list[float] = []
        for start in range(0, len(texts), self._batch_size):
            found += self._scored(texts[start : start + self._batch_size])
        return found

    def _scored(self, texts: Sequence[str]) -> list[float]:
        torch = self._torch
        each = [self._tokenizer(text)["input_ids"] for text in texts]
        longest = max(len(ids) for ids in each)
        if longest == 0:
            return [0.0] * len(texts)
        # On the right, where no token sees it: any id will do.
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in each])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in each])
        with torch.no_grad():
            logits: Any = self._model(padded, attention_mask=mask).logits
        log_probs = torch.log_softmax(logits[:, :-1].float(), -1)
        told = log_probs.gather(-1, padded[:, 1:, None])[..., 0] * mask[:, 1:]
        return told.sum(-1).tolist()
