"""A model of a few numbers, with which a run takes a second; all else is a run's own."""

import jax
import jax.numpy as jnp
import pytest

from fedasr.models.recogniser import Recogniser
from fedasr.training import stages
from fedasr.training.builders import models


def _build(config, augmented=True):
    shift = 1.0 if config.augment.enabled and augmented else 0.0

    def loss(params, batch, key):
        seen = jnp.mean(batch["features"]) + shift
        return jnp.sum(params["kernel"] ** 2) * seen + params["bias"] @ params["bias"], {}

    def init(key):
        return {"kernel": jax.random.normal(key, (3, 2)), "bias": jnp.ones(4)}

    return Recogniser(init, loss, lambda params, batch: ())  # never asked


@pytest.fixture(scope="module")
def small_model():
    """In place of every recogniser, without reports, in a whole file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build_recogniser", _build)
        patch.setattr(models, "build_base", _build)
        patch.setattr(stages, "write_report", lambda workdir: None)
        yield
