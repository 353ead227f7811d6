"""What may stand inside and around `accumulate`, or be a parameter.

Every row of docs/neighbours.md is a check; `python tests/test_neighbours.py` writes it.
"""

import inspect

import jax
import neighbours_inside
import neighbours_optimizers
import neighbours_outside
import neighbours_parameters
import pytest
from neighbours import NEWEST, OPTAX, PAGE, page

TABLES = {
    "inside": neighbours_optimizers.ROWS + neighbours_inside.ROWS,
    "outside": neighbours_outside.ROWS,
    "parameters": neighbours_parameters.ROWS,
}
CHECKS = {
    f"{where}: {row.name}".replace("`", ""): row.check
    for where, rows in TABLES.items()
    for row in rows
}
KNOWN = {name for rows in TABLES.values() for row in rows for name in row.optax_names}
# Since the oldest Optax that is supported; where one is missing, its check is empty.
NEWER = set(
    "optimistic_adam_v2 signum contrib.madgrad contrib.scale_by_madgrad contrib.galore "
    "contrib.scale_by_galore snapshot monitor measure_with_ema".split()
)


@pytest.fixture(autouse=True)
def _compile_fast():
    """Nearly all of the time here goes to XLA; the arithmetic stays as it is."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_row_says_what_is_not_true(name):
    CHECKS[name]()


def test_the_page_is_not_what_the_rows_say():
    hint = "run `python tests/test_neighbours.py`, which writes docs/neighbours.md"
    assert PAGE.read_text() == page(TABLES), hint


def is_transformation(thing):
    """By its signature or, without one, its docstring."""
    if not inspect.isfunction(thing):
        return False
    returns = inspect.signature(thing).return_annotation
    if returns is inspect.Signature.empty:
        returns = thing.__doc__
    return "GradientTransformation" in str(returns)


def test_optax_has_a_transformation_that_no_row_knows():
    found = {name for name, thing in OPTAX.items() if is_transformation(thing)}
    assert found - KNOWN == set()
    assert len(found) > 100


def test_a_row_speaks_of_something_that_optax_lacks():
    assert KNOWN - OPTAX.keys() <= (set() if NEWEST else NEWER)
    assert NEWER <= KNOWN


if __name__ == "__main__":
    PAGE.write_text(page(TABLES))
