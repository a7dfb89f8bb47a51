import functools

import jax
import pytest

from fedasr.kernels import devices


@pytest.fixture
def by_kernel(monkeypatch):
    """by_kernel(walks, loss)(kind): a loss and its gradient by a kernel, or by the loop for "".

    walks: module whose `posteriors` is then interpreted. loss: (logits, ...) -> (loss, feasible).
    """

    def make(walks, loss):
        interpreted = functools.partial(walks.posteriors, interpret=True)
        monkeypatch.setattr(walks, "posteriors", interpreted)

        def of(kind):
            def total(logits, *rest):
                losses, feasible = loss(logits, *rest)
                return losses.sum(), (losses, feasible)

            monkeypatch.setattr(devices, "platform", lambda: kind)
            return jax.jit(jax.value_and_grad(total, has_aux=True))

        return of

    return make
