"""The README and the pages that go on from it run, and its commands as CI runs them."""

import pathlib
import re

import accumax

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language, page=README):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_the_code_runs_from_top_to_bottom():
    namespace = {}
    for page in ("README.md", "docs/guide.md", "docs/flax.md"):
        blocks = _blocks("python", (ROOT / page).read_text())
        assert blocks
        for block in blocks:
            exec(block, namespace)
    for page in (  # each by itself
        "docs/batch_size.md",
        "docs/long_sequences.md",
        "docs/nothing_hidden.md",
    ):
        own = {}
        for block in _blocks("python", (ROOT / page).read_text()):
            exec(block, own)
    # 16 calls, and one more by each form of the guide's first block.
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


def test_every_link_leads_to_a_file():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readme_is_read_in_five_minutes():
    assert len(README.split()) <= 700
