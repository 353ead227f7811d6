"""Every test runs on the CPU, with the strictest settings that JAX has."""

import itertools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import hypothesis
import jax
import pytest

# Before there is a backend: four devices, for what is sharded. A program runs once or
# twice here, so LLVM and the emitters of kernels are not to take long over it (together
# more than half of the time); XLA's own passes are as ever. If the environment says
# with which level LLVM is to work, all is compiled as users have it.
FLAGS = f"--xla_force_host_platform_device_count=4 {os.environ.get('XLA_FLAGS', '')}"
if "xla_backend_optimization_level" not in FLAGS:
    FLAGS += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=1"
    FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
    if jax.__version_info__ < (0, 12):  # which has no other emitters
        FLAGS += " --xla_cpu_use_fusion_emitters=0"
os.environ["XLA_FLAGS"] = FLAGS

jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling is what takes time here, so the number of examples and not a deadline is
# what bounds a property; derandomized, because CI must say the same twice.
for profile, examples in (("few", 10), ("many", 40)):
    hypothesis.settings.register_profile(
        profile, deadline=None, max_examples=examples, derandomize=True
    )
hypothesis.settings.load_profile("few")  # .ci/run: --hypothesis-profile=many


@pytest.hookimpl(tryfirst=True)  # before what is slow is left out
def pytest_collection_modifyitems(items):
    """Marks as slow, or as whole, what a crossed test does not need to have each value.

    Of the combinations of a test's parameters the README's command, which leaves out
    what is slow, runs as few as have every value of every parameter among them.
    `.ci/run` runs as few as have every pair of values of two parameters. All others are
    marked as whole, and wait for a release. The carried twin of a form in place runs in
    the README's command if it is the subject: what has no parameter but `in_place` has
    one run.
    """
    assert os.environ["XLA_FLAGS"] == FLAGS, "Collecting a module set it."
    for item in items:
        if _axes(item) == {("in_place", "False")}:
            item.add_marker(pytest.mark.slow)
    crossed = [x for x in items if len(_axes(x)) > 1]
    for _, group in itertools.groupby(crossed, lambda x: (x.path, x.originalname)):
        group = list(group)
        few = _cover(group, 1)
        for item in group:
            if item not in few:
                item.add_marker(pytest.mark.slow)
        for item in set(group) - {*few, *_cover(group, 2, few)}:
            item.add_marker(pytest.mark.whole)


def _cover(items, size, chosen=()):
    """Few items that, with `chosen`, have every combination of `size` values."""

    def has(item):
        return set(itertools.combinations(sorted(_axes(item)), size))

    missing = set().union(*map(has, items)).difference(*map(has, chosen))
    found = []
    while missing:
        found.append(max(items, key=lambda item: len(missing & has(item))))
        missing -= has(found[-1])
    return found


def _axes(item):
    """The parameters of a test, each with its value."""
    found = getattr(item, "callspec", None)
    return {(name, repr(x)) for name, x in found.params.items()} if found else set()
