"""The numbers of README and pages are those of the benchmarks' results, by name."""

import json

import pytest
import quotes
import results

ROW = {"value": 1.0234, "unit": "x floor", "command": "benchmarks/run.py"}
ROWS = {
    "memory/mlp/cpu/train_step": ROW,
    "devices/8/sent": ROW | {"value": 1175.2, "unit": "MB"},
    "time/tpu/train_step": ROW | {"value": None, "note": "no TPU is here"},
}


@pytest.fixture
def root(tmp_path):
    """A repository with a page, and results of the code that is here."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("none\n")
    (tmp_path / "results").mkdir()
    save(tmp_path, results.fingerprint())
    return tmp_path


def save(root, code):
    found = {"chip": "cpu", "code": code, "rows": ROWS}
    (root / "results" / "2026-11-26-cpu.json").write_text(json.dumps(found))


def complaints(root, page, **options):
    (root / "docs" / "page.md").write_text(page)
    return quotes.complaints(root, root / "results", **options)


def test_a_number_is_filled_in_as_the_page_writes_it(root):
    page = (
        "<!-- n:memory/mlp/cpu/train_step -->?<!-- /n --> x, "
        "**<!-- n:devices/8/sent:,.0f -->?<!-- /n --> MB**"
    )
    filled = quotes.filled(page, results.load(root / "results"))
    assert filled == (
        "<!-- n:memory/mlp/cpu/train_step -->1.02<!-- /n --> x, "
        "**<!-- n:devices/8/sent:,.0f -->1,175<!-- /n --> MB**"
    )
    assert complaints(root, filled) == []


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        (
            "<!-- n:memory/mlp/cpu/train_step -->1.03<!-- /n -->",
            "docs/page.md: memory/mlp/cpu/train_step is 1.02, the page has 1.03",
        ),
        ("<!-- n:memory/mlp/gpu -->1.02<!-- /n -->", "have no memory/mlp/gpu"),
        ("<!-- n:time/tpu/train_step -->1.02<!-- /n -->", "no TPU is here"),
        ("<!-- n:devices/8/sent:,.q -->1,175<!-- /n -->", "devices/8/sent"),
        ("<!-- n:devices/8/sent -->1,175", "not between"),
        ("<!--n:devices/8/sent-->1,175<!-- /n -->", "not between"),
    ],
)
def test_a_number_that_is_not_in_the_results_is_named_with_its_page(
    root, page, complaint
):
    (found,) = complaints(root, page)
    assert "docs/page.md" in found
    assert complaint in found


def test_results_that_are_older_than_the_code_fail_where_this_is_asked_for(root):
    page = "<!-- n:memory/mlp/cpu/train_step -->1.02<!-- /n -->"
    assert complaints(root, page, stale=True) == []
    save(root, "another")
    assert complaints(root, page) == []
    (found,) = complaints(root, page, stale=True)
    assert "2026-11-26-cpu.json" in found


def test_the_numbers_of_the_pages_are_those_of_the_results():
    assert quotes.complaints() == [], "run python docs/quotes.py"
