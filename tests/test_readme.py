"""README and pages run, lead somewhere and make a site; CI runs their commands."""

import pathlib
import re

import hooks
import pytest

import accumax

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ROOT / "docs"
IN_TURN = "../README.md", "which_form.md", "flax.md"  # each uses names of those before
ALONE = (
    "batch_size.md",
    "coupled_losses.md",
    "long_sequences.md",
    "nothing_hidden.md",
)
DAMAGE = "silent_failures.md", "upstream/flax.md", "upstream/optax.md"
ELSEWHERE = {  # the tests that run a page by its sections, or write it
    "coming_from.md": "test_coming_from.py",
    "many_devices.md": "test_many_devices.py",
    "neighbours.md": "test_neighbours.py",
}


def _blocks(language, page=README):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def _run(name, namespace):
    """Runs the page's blocks, from top to bottom."""
    blocks = _blocks("python", (PAGES / name).read_text())
    assert blocks
    for block in blocks:
        exec(block, namespace)
    return namespace


def test_the_code_runs_from_top_to_bottom():
    namespace = {}
    for page in IN_TURN:
        _run(page, namespace)
    # 16 calls, and one more by each form of the first block of the second page.
    state = namespace["opt_state"]
    assert (state.gradient_step, state.mini_step) == (2, 3)
    assert not accumax.has_updated(state)


@pytest.mark.parametrize("page", ALONE)
def test_the_page_runs_by_itself(page):
    _run(page, {})


@pytest.mark.parametrize("page", DAMAGE)
def test_the_damage_of_a_failure_is_the_one_that_the_page_says(page):
    damage = _run(page, {})["damage"]
    text = (PAGES / page).read_text()
    said = re.findall(r'^damage\["(.*?)"\] = .*?  # ([\d.]+)$', text, re.MULTILINE)
    assert [name for name, _ in said] == list(damage)
    for name, number in said:
        decimals = len(number.split(".")[1])
        assert number == f"{damage[name]:.{decimals}f}", name


def test_every_page_with_code_is_run_by_a_test():
    for path in PAGES.rglob("*.md"):
        name = path.relative_to(PAGES).as_posix()
        if _blocks("python", path.read_text()):
            assert name in {*IN_TURN, *ALONE, *DAMAGE, *ELSEWHERE}, name
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / "tests" / test).read_text()


def test_every_public_name_has_a_page_of_the_api():
    assert {name for name in hooks.public() if "." not in name} == {
        name
        for name, thing in vars(accumax).items()
        if not name.startswith("_") and callable(thing)
    }
    for place in hooks.public().values():
        assert hooks.first_line(place)


def test_every_page_is_in_the_navigation_of_the_site():
    site = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w]+\.md", site.split("\nnav:")[1]))
    made = {*hooks.COPIES.values()}
    assert {x.name for x in PAGES.glob("*.md")} | made | {"index.md"} == listed


def test_ci_runs_the_readmes_test_command():
    commands = [block.strip() for block in _blocks("sh")]
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()
    assert all(len(command.splitlines()) == 1 for command in commands[:2])


def test_the_version_is_said_once():
    assert f"version: {accumax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_every_link_leads_to_a_file():
    for page in (ROOT / "README.md", *PAGES.rglob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readme_is_read_in_five_minutes():
    seen = re.sub(r"<!--.*?-->", "", README)  # the names of its numbers are not
    assert len(seen.split()) <= 700
