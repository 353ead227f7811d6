"""The wings of the house and the arrows between them: the table is the diagram."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import house
import pytest

import accumax

PACKAGE = pathlib.Path(accumax.__file__).parent

# A wing is a folder, or a file of its own. It may import those that are listed; arrows
# go one way: from the doors to _batch and _window, to _devices, to _xla and _sums, to
# _tree, to _types.
LEAST = "_tree", "_types"
FORMS = "_accumulate", "_train_step"
ARROWS = {
    "_types": set(),
    "_tree": {"_types"},
    "_noise": {*LEAST},
    "_sums": {"_noise", *LEAST},
    "_xla": {*LEAST},
    "_devices": {"_xla", *LEAST},
    "_batch": {"_devices", "_xla", "_sums", "_noise", *LEAST},
    "_window": {"_devices", "_xla", "_sums", "_noise", *LEAST},
    "_accumulate": {"_window", "_devices", "_sums", *LEAST},
    "_step": {"_batch", "_window", "_devices", *LEAST},
    "_train_step": {"_step", "_batch", "_devices", "_window", "_types"},
    "_value_and_grad": {"_batch", "_devices", "_sums", *LEAST},
    "_microbatch": {"_batch", "_xla", "_sums", *LEAST},
    "_compiled": set(),
    "_flax": {"_accumulate", "_batch", "_window", "_devices", "_xla", *LEAST},
    "linen": {*FORMS, "_step", "_flax", "_batch", "_window", *LEAST},
    "nnx": {*FORMS, "_value_and_grad", "_step", "_flax", "_batch", "_window", *LEAST},
    "_testing": {*LEAST},  # for anyone's step, so it knows none of ours
    "testing": {"_testing", "_types"},
    "audit": {"_compiled"},
    "plan": {"_compiled"},
    "__init__": {
        *FORMS,
        "_value_and_grad",
        "_microbatch",
        "_window",
        "_devices",
        "_compiled",
    },
}
# What a room may import from outside. Flax is for accumax.linen, accumax.nnx and what
# these alone import, matplotlib and tqdm for a picture and a progress bar alone.
OUTSIDE = {"jax", "optax", "numpy", *sys.stdlib_module_names}


def _outside(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.split(".")[0] for name in found}


def test_arrows_go_one_way():
    found = house.wings(PACKAGE)
    assert found == ARROWS
    order = graphlib.TopologicalSorter(found)
    assert {*order.static_order()} == found.keys()  # a CycleError if they do not


def test_the_page_about_the_inside_shows_this_house():
    assert house.drawing(PACKAGE) in house.PAGE.read_text(), "run docs/house.py"


def test_flax_is_imported_for_flax_alone():
    for path in PACKAGE.rglob("*.py"):
        wing = path.relative_to(PACKAGE).with_suffix("").parts[0]
        flax = {"flax"} if wing in ("linen", "nnx", "_flax") else set()
        flax |= {"matplotlib", "tqdm"} if wing == "_compiled" else set()
        assert _outside(path) <= OUTSIDE | flax, path


def test_no_room_is_too_large():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path.name


def test_no_private_jax_name():
    for path in PACKAGE.rglob("*.py"):
        assert "_src" not in path.read_text(), path.name


@pytest.mark.slow
def test_import_does_not_import_flax():
    code = "import accumax, sys; sys.exit(any(x in sys.modules for x in %r))"
    code %= (("flax", "matplotlib", "tqdm"),)
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in ("linen", "nnx"):  # and each of these only what it is for
        code = f"import accumax.{name}, sys; sys.exit('flax' not in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_index_is_what_the_design_names():
    public = {name for name in vars(accumax) if not name.startswith("_")}
    assert public - {
        "linen",
        "nnx",
        "testing",
    } == {  # these only once they are imported
        "AccumulateState",
        "DataParallel",
        "FSDP",
        "accumulate",
        "apply_gradients",
        "audit",
        "flush",
        "grad",
        "has_updated",
        "microbatch",
        "noise_scale",
        "plan",
        "train_step",
        "value_and_grad",
    }
