"""FedJAX's federated averaging, its clients on one device (mode "jit") or side by side on several
("pmap"), of a model from flax's layers and optax's loss; or, with "ours" in the mode, of fedasr's
model with its own loss."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax


def sharded(trees, devices):
    """One tree for each device, as JAX's function of old did it."""
    mesh = jax.sharding.Mesh(np.asarray(devices), ("devices",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    return jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves), rows), *trees)


# FedJAX 0.0.17 asks for names that JAX has dropped since.
jax.tree_map = jax.tree.map
jax.device_put_sharded = sharded
jax.device_put_replicated = lambda tree, devices: sharded([tree] * len(devices), devices)

import fedjax  # noqa: E402
from fedjax.algorithms import fed_avg  # noqa: E402
from flax_model import Recogniser  # noqa: E402
from work import KINDS, parse, serve  # noqa: E402

from fedasr.models.recogniser import make_recogniser  # noqa: E402

work = parse(sys.argv[1])
backend, _, whose = work.mode.partition(" ")
sizes = {"dim": work.dim, "mlp": work.mlp, "blocks": work.blocks, "heads": work.heads}
if whose == "ours":
    recogniser = make_recogniser("transformer", sizes)
    params = recogniser.init(jax.random.key(0))

    def loss(model, batch, rng):
        count = batch["labels"].shape[0]
        full = {
            "features_length": jnp.full(count, work.frames, jnp.int32),
            "labels_length": jnp.full(count, work.labels, jnp.int32),
            "mask": jnp.ones(count, bool),
        }
        return recogniser.loss(model, batch | full, rng)[0]

else:
    module = Recogniser(**sizes)
    params = module.init(jax.random.key(0), jnp.zeros((1, work.frames, 80)))["params"]

    def loss(model, batch, rng):
        del rng
        return module.loss(model, batch["features"], batch["labels"])


local = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
with fedjax.for_each_client_backend(backend):
    algorithm = fed_avg.federated_averaging(
        jax.grad(loss),
        fedjax.optimizers.create_optimizer_from_optax(local),
        fedjax.optimizers.create_optimizer_from_optax(optax.lamb(1e-3)),
        fedjax.ShuffleRepeatBatchHParams(batch_size=work.batch, num_epochs=1),
    )


def rounds(kind):
    clients = [
        (client, fedjax.ClientDataset(work.data(client, steps)), jax.random.PRNGKey(client))
        for client, steps in work.own(kind).items()
    ]
    state = [algorithm.init(params)]

    def round():
        new, _ = algorithm.apply(state[0], clients)
        # A device's part of an array has kept its first axis, of 1, since pmap was made anew.
        state[0] = jax.tree.map(lambda x, old: x.reshape(old.shape), new, state[0])
        jax.block_until_ready(state[0].params)

    return round


serve({kind: rounds(kind) for kind in KINDS})
