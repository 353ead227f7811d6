"""Devices to compile for, there or not."""

import contextlib
import os
from typing import Any, TypeAlias

import jax
from jax.experimental import topologies

Device: TypeAlias = Any  # JAX has no type for it that a checker understands

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TPU = {  # what libtpu would ask the machine that it runs on
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
CHIPS = {"gpu": "H100 80GB", "tpu": "TPU v5e"}
INSTALL = {
    "gpu": f'"jax-cuda12-plugin=={jax.__version__}" '
    f'"jax-cuda12-pjrt=={jax.__version__}"',
    "tpu": f'"jax[tpu]=={jax.__version__}"',
}


def device(target: str) -> Device:
    """A device to compile for: this machine's CPU, or a GPU or TPU that is not here."""
    return devices(target, 1)[0]


def devices(target: str, count: int = 8) -> list[Device]:
    """`count` such devices that are connected, up to 8.

    Of the CPU there are as many as JAX began with, if it has begun already.
    """
    jax.config.update("jax_platforms", "cpu")
    if target == "cpu":
        if count > 1 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
            with contextlib.suppress(RuntimeError):  # it has begun
                jax.config.update("jax_num_cpu_devices", count)
        return jax.devices()[:count]
    try:
        if target == "tpu":
            for name, value in TPU.items():
                os.environ.setdefault(name, value)
            return list(topologies.get_topology_desc("v5e:2x4", "tpu").devices)[:count]
        _know_cuda()
        return list(
            topologies.get_topology_desc(
                "h100", "cuda", target_config=H100, topology=f"1x1x{count}"
            ).devices
        )
    except Exception as error:
        raise SystemExit(
            f"{error}\n\nThe compiler for {target} is missing or does not fit jax "
            f"{jax.__version__}. Run: python -m pip install {INSTALL[target]}"
        ) from error


def _know_cuda() -> None:
    """Makes JAX accept "cuda" where no CUDA device is present.

    There is no public way to lower for a GPU topology on a machine without one, so this
    replaces a private function. Benchmarks may; the package never does.
    """
    from jax._src import xla_bridge  # noqa: TID251

    known = xla_bridge.canonicalize_platform

    def canonicalize(platform: str) -> str:
        try:
            return known(platform)
        except RuntimeError:
            return "cuda"

    xla_bridge.canonicalize_platform = canonicalize
