"""Names of parameters: hashes that only the same leaves under the same paths have."""

import hashlib
from typing import Any

import jax
import numpy as np

# What is hashed before each leaf's bytes. Identities and work directories hold hashes with either,
# so that neither can change.
RUN, START = "{name} {shape} {dtype}", "{name} {dtype} {shape} "


def params_digest(params: Any, head: str = RUN) -> str:
    """Names parameters by their paths, shapes, dtypes and bits.

    Args:
      params: pytree of arrays.
      head: of each leaf, with `{name}`, `{shape}` and `{dtype}`.

    Returns:
      SHA-256 in 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        array = np.asarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(head.format(name=name, shape=array.shape, dtype=array.dtype).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
