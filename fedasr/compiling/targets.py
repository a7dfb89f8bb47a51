"""Accelerators to compile for: what their makers say of them, and how their compilers are reached.

No device is needed. For a TPU JAX gives the devices of a topology, with which `libtpu` compiles;
for a GPU the CUDA plugin compiles for a description of the card (XLA's target configuration). The
figures are the makers': Google's pages on TPU v5e, v5p and v6e, NVIDIA's data sheets of H100 SXM,
H200 and T4.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedasr.errors import UserError

if TYPE_CHECKING:  # JAX reads the environment when it is imported: see `prepare`
    import jax

# libtpu asks a machine with TPUs for these; without them it waits for one or names no workers.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# Distribution, and what to install for it.
_WHEELS = {
    "tpu": (("libtpu", "jax[tpu]"),),
    "cuda": tuple(
        (name, name) for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")
    ),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of accelerator.

    Attributes:
      name: as in `--targets`. platform: "tpu" or "cuda".
      memory: bytes of a device. flops: bfloat16 products and sums per second, dense.
      bandwidth: bytes per second between memory and compute.
      topology: what the compiler calls a group; of a TPU followed by ":" and its shape.
      accelerator: of a TPU, the type that its runtime would be told.
      axes: of a TPU topology. block: devices of the smallest.
      cuda: of a GPU, XLA's target configuration.
    """

    name: str
    platform: str
    memory: int
    flops: float
    bandwidth: float
    topology: str
    accelerator: str = ""
    axes: int = 2
    cuda: str = ""


def _cuda(description: str, major: int, minor: int, **numbers: int | float) -> str:
    """XLA's target configuration (a text proto) of a card."""
    common = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
        "block_dim_limit_x": 2_147_483_647,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
    }
    fields = "\n".join(f"  {name}: {value}" for name, value in (common | numbers).items())
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{\n{fields}\n{capability}\n}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 }\n"
        f'device_description_str: "{description}"\n'
    )


_HOPPER = {
    "shared_memory_per_core": 233_472,
    "shared_memory_per_block_optin": 232_448,
    "threads_per_core_limit": 2_048,
    "core_count": 132,
    "fpus_per_core": 128,
    "l2_cache_size": 52_428_800,
    "clock_rate_ghz": 1.98,
}
_GIB = 2**30
TARGETS = {
    target.name: target
    for target in (
        Target("v5e", "tpu", 16 * _GIB, 197e12, 819e9, "v5e", "v5litepod"),
        Target("v5p", "tpu", 95 * _GIB, 459e12, 2_765e9, "v5p", "v5p", axes=3),
        Target("v6e", "tpu", 32 * _GIB, 918e12, 1_640e9, "v6e", "v6e"),
        Target(
            "h100", "cuda", 80 * _GIB, 989e12, 3_350e9, "h100",
            cuda=_cuda(
                "NVIDIA H100 80GB HBM3", 9, 0, **_HOPPER,
                memory_bandwidth=3_350_000_000_000, device_memory_size=80 * _GIB,
            ),
        ),
        Target(
            "h200", "cuda", 141 * _GIB, 989e12, 4_800e9, "h200",
            cuda=_cuda(
                "NVIDIA H200", 9, 0, **_HOPPER,
                memory_bandwidth=4_800_000_000_000, device_memory_size=141 * _GIB,
            ),
        ),
        Target(
            "t4", "cuda", 15 * _GIB, 65e12, 320e9, "t4",
            cuda=_cuda(
                "Tesla T4", 7, 5,
                shared_memory_per_core=65_536, shared_memory_per_block_optin=65_536,
                threads_per_core_limit=1_024, core_count=40, fpus_per_core=64,
                l2_cache_size=4_194_304, clock_rate_ghz=1.59,
                memory_bandwidth=320_000_000_000, device_memory_size=15 * _GIB,
            ),
        ),
    )
}  # fmt: skip


def target_by_name(name: str) -> tuple[Target, int]:
    """The target, and how many of its devices: "v5e" is one, "v5e-8" eight.

    Raises:
      UserError: for a name that is none, or a number of devices that no topology has.
    """
    kind, dash, count = name.partition("-")
    if kind not in TARGETS:
        raise UserError(f"--targets={name}: choose from {', '.join(TARGETS)}, or TARGET-DEVICES")
    if dash and not (count.isdecimal() and int(count) > 0):
        raise UserError(f"--targets={name}: after the dash comes a number of devices, as in v5e-8")
    return TARGETS[kind], int(count or 1)


def prepare(targets: Sequence[Target]) -> None:
    """Sets what the compilers read from the environment: before JAX starts any platform.

    The programs are lowered on a CPU, whatever else the machine has.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    # A program that was compiled without a device cannot be read back without one.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    accelerators = {target.accelerator for target in targets if target.accelerator}
    if accelerators:
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{min(accelerators)}-4")


def missing_wheel(target: Target) -> str | None:
    """What has to be installed before this target's compiler is there; None if it is there."""
    for name, requirement in _WHEELS[target.platform]:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            return requirement
    return None


def _shape(devices: int, axes: int) -> str:
    """The smallest topology of a TPU with so many devices: powers of two, as square as can be."""
    sides = [1] * axes
    while (product := _product(sides)) < devices:
        sides[sides.index(min(sides))] *= 2
        if product > 1 << 20:
            break
    if axes == 2:
        sides = [max(side, 2) for side in sides]
    elif _product(sides) < 4:
        sides = [2, 2, 1]
    return "x".join(str(side) for side in sorted(sides, reverse=True))


def _product(sides: Sequence[int]) -> int:
    product = 1
    for side in sides:
        product *= side
    return product


def devices(target: Target, count: int = 1) -> list[jax.Device]:
    """So many devices to compile for; they cannot compute.

    Raises:
      UserError: the compiler is not installed, or has no such topology.
    """
    import jax
    from jax.experimental import topologies

    if requirement := missing_wheel(target):
        raise UserError(f"{target.name}: its compiler is missing: pip install '{requirement}'")
    if target.platform == "tpu":
        named = {"topology_name": f"{target.topology}:{_shape(count, target.axes)}"}
    else:
        named = {
            "topology_name": target.topology,
            "topology": f"1x1x{count}",
            "target_config": target.cuda,
        }
    try:
        topology = topologies.get_topology_desc(platform=target.platform, **named)
    except NotImplementedError as error:
        # JAX has looked for platforms before `prepare` could say that none is needed.
        remedy = "start Python with JAX_PLATFORMS=cpu in its environment"
        raise UserError(f"{target.name}: its compiler was not loaded: {remedy}") from error
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{target.name}: no topology of {count} devices: {reason}") from error
    found = list(topology.devices)
    if len(found) < count:
        raise UserError(f"{target.name}: the topology has {len(found)} devices, not {count}")
    return found[:count]
