"""The README runs: its code, and its commands as CI runs them."""

import pathlib
import re

import accumax

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_code_runs_from_top_to_bottom():
    namespace = {}
    blocks = _blocks("python")
    assert blocks
    for block in blocks:
        exec(block, namespace)
    # 16 calls, and one more by each form of the second block.
    state = namespace["opt_state"]
    assert (state.gradient_step, state.mini_step) == (2, 3)
    assert not accumax.has_updated(state)


def test_ci_runs_the_readmes_test_command():
    commands = [block.strip() for block in _blocks("sh")]
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()
    assert all(len(command.splitlines()) == 1 for command in commands[:2])


def test_the_version_is_said_once():
    assert f"version: {accumax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
