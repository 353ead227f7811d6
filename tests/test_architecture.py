"""The rooms and their doors: the table is the architecture diagram."""

import ast
import pathlib
import subprocess
import sys

import pytest

import accumax

PACKAGE = pathlib.Path(accumax.__file__).parent

# A room may import those that are listed. Arrows go one way: _types -> _numerics ->
# _jaxprs, _shardings -> _devices -> _accumulator, _gather, _inplace, _loss, _arguments
# -> _split, _inner -> _reduce -> _window, _loop -> the public forms -> _statistics,
# _handing -> Flax.
ALLOWED = {
    "_types": set(),
    "_numerics": {"_types"},
    "_jaxprs": {"_types"},
    "_shardings": {"_types"},
    "_devices": {"_types", "_numerics", "_shardings"},
    "_gather": {"_types", "_numerics", "_shardings", "_devices"},
    "_accumulator": {"_types", "_numerics"},
    "_inplace": {"_types", "_numerics", "_jaxprs", "_shardings"},
    "_loss": {"_numerics", "_accumulator"},
    "_arguments": {"_types", "_numerics"},
    "_inner": {"_types", "_numerics", "_arguments"},
    "_split": {
        "_types",
        "_numerics",
        "_shardings",
        "_devices",
        "_inplace",
        "_arguments",
    },
    "_reduce": {"_types", "_numerics", "_shardings", "_devices", "_split"},
    "_state": {"_types"},
    "_window": {
        "_types",
        "_numerics",
        "_devices",
        "_accumulator",
        "_inplace",
        "_arguments",
        "_inner",
        "_state",
    },
    "_loop": {
        "_types",
        "_numerics",
        "_jaxprs",
        "_shardings",
        "_devices",
        "_gather",
        "_accumulator",
        "_inplace",
        "_loss",
        "_split",
        "_reduce",
    },
    "_accumulate": {
        "_types",
        "_devices",
        "_accumulator",
        "_arguments",
        "_inner",
        "_state",
        "_window",
    },
    "_microbatch": {
        "_types",
        "_numerics",
        "_devices",
        "_gather",
        "_accumulator",
        "_loss",
        "_arguments",
        "_split",
        "_reduce",
        "_loop",
    },
    "_recompute": {
        "_types",
        "_numerics",
        "_inplace",
        "_shardings",
        "_accumulator",
        "_arguments",
        "_split",
        "_reduce",
        "_loop",
    },
    "_backward": {
        "_types",
        "_numerics",
        "_devices",
        "_gather",
        "_accumulator",
        "_inplace",
        "_loss",
        "_split",
        "_reduce",
        "_loop",
    },
    "_train_step": {
        "_types",
        "_numerics",
        "_devices",
        "_gather",
        "_loss",
        "_arguments",
        "_inner",
        "_split",
        "_reduce",
        "_state",
        "_window",
        "_loop",
        "_backward",
    },
    "_ema": {"_types", "_numerics", "_inplace", "_accumulate"},
    "_statistics": {"_types", "_numerics", "_devices", "_state"},
    "_handing": {
        "_types",
        "_numerics",
        "_devices",
        "_loss",
        "_arguments",
        "_split",
        "_statistics",
    },
    "linen": {
        "_types",
        "_numerics",
        "_loss",
        "_arguments",
        "_split",
        "_state",
        "_accumulate",
        "_train_step",
        "_ema",
        "_statistics",
        "_handing",
    },
    "nnx": {
        "_types",
        "_numerics",
        "_loss",
        "_arguments",
        "_state",
        "_accumulate",
        "_microbatch",
        "_train_step",
        "_ema",
        "_statistics",
        "_handing",
    },
    "__init__": {"_state", "_accumulate", "_microbatch", "_recompute", "_train_step"},
}
# What a room may import from outside. Flax is for accumax.linen and accumax.nnx alone.
OUTSIDE = {"jax", "optax", "numpy", *sys.stdlib_module_names}


def _imports(path: pathlib.Path) -> tuple[set[str], set[str]]:
    rooms, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [a.name for a in node.names]
            rooms |= set(names)
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module)
        elif isinstance(node, ast.Import):
            outside |= {alias.name for alias in node.names}
    return rooms, {name.split(".")[0] for name in outside if name}


def test_arrows_go_one_way():
    files = {path.stem: path for path in PACKAGE.glob("*.py")}
    assert files.keys() == ALLOWED.keys()
    for name, path in files.items():
        rooms, outside = _imports(path)
        assert rooms == ALLOWED[name], name
        flax = {"flax"} if name in ("linen", "nnx") else set()
        assert outside <= OUTSIDE | flax, name


def test_no_room_is_too_large():
    for path in PACKAGE.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path.name


def test_no_private_jax_name():
    for path in PACKAGE.glob("*.py"):
        assert "_src" not in path.read_text(), path.name


@pytest.mark.slow
def test_import_does_not_import_flax():
    code = "import accumax, sys; sys.exit('flax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in ("linen", "nnx"):  # and each of these only what it is for
        code = f"import accumax.{name}, sys; sys.exit('flax' not in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_index_is_what_the_design_names():
    public = {name for name in vars(accumax) if not name.startswith("_")}
    assert public - {"linen", "nnx"} == {  # those two only once they are imported
        "AccumulateState",
        "accumulate",
        "apply_gradients",
        "flush",
        "grad",
        "has_updated",
        "microbatch",
        "train_step",
        "value_and_grad",
    }
