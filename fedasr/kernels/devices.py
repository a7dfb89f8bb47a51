"""Which kernels written for one kind of device fit where a program is being traced."""

import importlib.util
import os
import re
from typing import Any

import jax
from jax.sharding import AxisType

_TRITON = re.compile(r"\b(A10|A30|A40|A100|L4|L40S?|G?H100|G?H200|G?B200|G?B300)\b")
_SMALL = re.compile(r"TPU v[234]\b")
# Why kernels are not used on a kind of device that is here, "" where they are: see `trial`.
TRIED: dict[str, str] = {}


def platform() -> str:
    """The kind of kernel that fits here, while tracing: "tpu", "gpu", or "" for none.

    That is of the devices of the `jax.shard_map` around, if it divides all its axes by hand.
    """
    device = _here()
    return "" if device is None or TRIED.get(device.device_kind) else kind_of(device)


def _here() -> Any:
    """What `platform` speaks of; None for no such device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(x != AxisType.Manual for x in mesh.axis_types):
        return None
    return getattr(mesh, "abstract_device", None)


def for_layers() -> str:
    """The kind of kernel for whole layers that fits here, as `platform`: "tpu" or ""."""
    return platform() if has_room(_here()) else ""


def has_room(device: Any) -> bool:
    """Whether a device has fast memory for a whole layer: of TPUs, 64 MiB since v5, before 16."""
    kind = getattr(device, "device_kind", "")
    return kind_of(device) == "tpu" and not _SMALL.match(kind)


def kind_of(device: Any) -> str:
    """The kind of kernel that is written for a device, which need not be there; "" for none."""
    found = getattr(device, "platform", "")
    if found == "tpu":
        return "tpu"
    # XLA's Triton is for compute capability 8.0 and above; JAX may give Pallas's up.
    fits = found in ("gpu", "cuda") and _TRITON.search(device.device_kind)
    return "gpu" if fits and importlib.util.find_spec("jax.experimental.pallas.triton") else ""


_TRITON_PRODUCTS = "xla_gpu_enable_triton_gemm"
_V5P = ("TPU v5", "TPU v5p")  # as JAX calls it
_TPU_ROOM = "xla_tpu_scoped_vmem_limit_kib"


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Options of XLA for a client's program on a mesh; what its flags name stays as it is there.

    On GPUs products are the library's (cuBLAS). XLA would try some dozens of kernels of its own for
    each, which takes minutes, and those copy their part of a stack of blocks before they read it.

    On a TPU v5p each operation may use all of the fast memory. XLA would keep values there from one
    operation to the next, and copy other values out to make room. A v5e and v6e have twice as much.
    """
    device = mesh.devices.flat[0]
    kind = device.platform
    if kind == "tpu" and device.device_kind in _V5P:
        return _unless_said("LIBTPU_INIT_ARGS", _TPU_ROOM, 1 << 17)
    if kind in ("gpu", "cuda"):
        return _unless_said("XLA_FLAGS", _TRITON_PRODUCTS, False)
    return {}


def _unless_said(variable: str, option: str, value: Any) -> dict[str, Any]:
    return {} if option in os.environ.get(variable, "") else {option: value}


def lowered(traced: jax.stages.Traced, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Lowers a program for a mesh whose devices need not be there.

    Kernels ask the context which devices they are lowered for.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return traced.lower()
