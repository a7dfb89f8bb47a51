"""Simulated federated learning of speech recognisers with user-level differential privacy.

The names below are what most research scripts need, as `import fedasr as fa` gives them. They are
looked up when they are used: importing fedasr imports neither JAX nor anything else that is large.
Everything else is in the modules, by its full name.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedasr.audio.augment import SpecAugmentConfig as SpecAugmentConfig
    from fedasr.audio.features import LogMelConfig as LogMelConfig
    from fedasr.audio.features import log_mel as log_mel
    from fedasr.auditing import Audit as Audit
    from fedasr.auditing import audit_updates as audit_updates
    from fedasr.data.batching import Batching as Batching
    from fedasr.data.batching import Grid as Grid
    from fedasr.data.batching import LocalBatches as LocalBatches
    from fedasr.data.batching import make_resident as make_resident
    from fedasr.data.corpus import Corpus as Corpus
    from fedasr.data.corpus import InMemoryCorpus as InMemoryCorpus
    from fedasr.data.preparation.prepare import prepare as prepare
    from fedasr.data.records import open_corpus as open_corpus
    from fedasr.data.utterances import Utterance as Utterance
    from fedasr.data.writing import write_corpus as write_corpus
    from fedasr.errors import UserError as UserError
    from fedasr.federated.algorithms import Algorithm as Algorithm
    from fedasr.federated.algorithms.fedavg import FedAvg as FedAvg
    from fedasr.federated.client import ClientMetrics as ClientMetrics
    from fedasr.federated.client import ClientUpdate as ClientUpdate
    from fedasr.federated.client import batch_gradient as batch_gradient
    from fedasr.federated.client import local_training as local_training
    from fedasr.federated.client import take_batch as take_batch
    from fedasr.federated.hardware import Hardware as Hardware
    from fedasr.federated.local import LocalStore as LocalStore
    from fedasr.federated.local import make_layout as make_layout
    from fedasr.federated.metrics import RoundMetrics as RoundMetrics
    from fedasr.federated.server import ServerState as ServerState
    from fedasr.federated.simulation import Simulation as Simulation
    from fedasr.models.conformer import ConformerConfig as ConformerConfig
    from fedasr.models.peft import PeftConfig as PeftConfig
    from fedasr.models.peft import adapt as adapt
    from fedasr.models.peft import merged as merged
    from fedasr.models.recogniser import Recogniser as Recogniser
    from fedasr.models.recogniser import ctc_recogniser as ctc_recogniser
    from fedasr.models.recogniser import recogniser as recogniser
    from fedasr.models.transformer import TransformerConfig as TransformerConfig
    from fedasr.privacy.accounting import Epsilon as Epsilon
    from fedasr.privacy.adaptive import AdaptiveClip as AdaptiveClip
    from fedasr.privacy.clipping import clip_by_layer as clip_by_layer
    from fedasr.privacy.clipping import clip_global as clip_global
    from fedasr.privacy.correlated import BandedNoise as BandedNoise
    from fedasr.privacy.correlated import BufferedNoise as BufferedNoise
    from fedasr.privacy.mechanism import Mechanism as Mechanism
    from fedasr.privacy.sampling import FixedSizeSampler as FixedSizeSampler
    from fedasr.privacy.sampling import PoissonSampler as PoissonSampler
    from fedasr.privacy.sampling import Sampler as Sampler
    from fedasr.privacy.sampling import ShuffledSampler as ShuffledSampler
    from fedasr.privacy.secure_aggregation import SecureAggregation as SecureAggregation
    from fedasr.streams import secret_root as secret_root
    from fedasr.text import CharTokenizer as CharTokenizer
    from fedasr.text import SubwordTokenizer as SubwordTokenizer
    from fedasr.training.checkpoint import restore_params as restore_params
    from fedasr.training.config import default_config as default_config
    from fedasr.training.evaluation import Evaluator as Evaluator
    from fedasr.training.evaluation import evaluate as evaluate
    from fedasr.training.metrics import char_errors as char_errors
    from fedasr.training.metrics import word_errors as word_errors
    from fedasr.training.transcription import load as load

__version__ = "0.1.0"

# The module of every name. The imports above say the same to type checkers.
_HOMES = {
    "audio.augment": ("SpecAugmentConfig",),
    "audio.features": ("LogMelConfig", "log_mel"),
    "data.batching": ("Batching", "Grid", "LocalBatches", "make_resident"),
    "data.corpus": ("Corpus", "InMemoryCorpus"),
    "data.preparation.prepare": ("prepare",),
    "data.records": ("open_corpus",),
    "data.utterances": ("Utterance",),
    "data.writing": ("write_corpus",),
    "errors": ("UserError",),
    "federated.algorithms": ("Algorithm",),
    "federated.algorithms.fedavg": ("FedAvg",),
    "federated.client": (
        "ClientMetrics",
        "ClientUpdate",
        "batch_gradient",
        "local_training",
        "take_batch",
    ),
    "federated.hardware": ("Hardware",),
    "federated.local": ("LocalStore", "make_layout"),
    "federated.metrics": ("RoundMetrics",),
    "federated.server": ("ServerState",),
    "federated.simulation": ("Simulation",),
    "models.conformer": ("ConformerConfig",),
    "models.peft": ("PeftConfig", "adapt", "merged"),
    "models.recogniser": ("Recogniser", "ctc_recogniser", "recogniser"),
    "models.transformer": ("TransformerConfig",),
    "privacy.accounting": ("Epsilon",),
    "privacy.adaptive": ("AdaptiveClip",),
    "auditing": ("Audit", "audit_updates"),
    "privacy.clipping": ("clip_by_layer", "clip_global"),
    "privacy.correlated": ("BandedNoise", "BufferedNoise"),
    "privacy.mechanism": ("Mechanism",),
    "privacy.sampling": ("FixedSizeSampler", "PoissonSampler", "Sampler", "ShuffledSampler"),
    "privacy.secure_aggregation": ("SecureAggregation",),
    "streams": ("secret_root",),
    "text": ("CharTokenizer", "SubwordTokenizer"),
    "training.checkpoint": ("restore_params",),
    "training.config": ("default_config",),
    "training.evaluation": ("Evaluator", "evaluate"),
    "training.metrics": ("char_errors", "word_errors"),
    "training.transcription": ("load",),
}
_HOME = {name: f"fedasr.{module}" for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
