"""Every test runs on the CPU, with the strictest settings that JAX has."""

import os

# Before jax is imported: four devices, for what is sharded.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
)

import hypothesis
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling is what takes time here, so the number of examples and not a deadline is
# what bounds a property; derandomized, because CI must say the same twice.
hypothesis.settings.register_profile(
    "accumax", deadline=None, max_examples=40, derandomize=True
)
hypothesis.settings.load_profile("accumax")
