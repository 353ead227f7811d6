"""What `benchmarks/run.py` writes can be read, and says where a peer is ahead."""

import ast
import dataclasses
import json
import pathlib

import notes
import page
import pytest
import results
import run
from results import Row

FACTS = {
    "date": "2026-01-01",
    "chip": "abacus",
    "host": "a desk",
    "versions": {"jax": "1"},
    "python": "3",
    "seconds": 1,
    "quick": False,
}
OURS = Row("memory/mlp/adamw/cpu/train_step", 1.1, "x floor", "python run.py")
PEER = Row("memory/mlp/adamw/cpu/multisteps", 1.0, "x floor", "python run.py")


def test_the_smallest_run_is_read_back(tmp_path):
    paths = run.main(["--tiny", "--only", "inner_runs", "--output", str(tmp_path)])
    rows = results.load(tmp_path)
    assert rows["inner_runs/multisteps"].value == 8
    assert rows["inner_runs/train_step"].value == 1
    command = "python benchmarks/run.py --only inner_runs"
    assert {row.command for row in rows.values()} == {command}
    written = json.loads(paths[0].read_text())
    assert written["code"] == results.fingerprint()
    assert {"date", "chip", "versions"} <= written.keys()
    assert not results.stale(tmp_path)


def test_a_row_that_a_peer_is_ahead_of_says_why_and_is_marked():
    row, _ = notes.explained([OURS, PEER])
    assert row.note.startswith("multisteps has 1.")
    text = page.text([row, PEER], FACTS)
    assert f"**1.1**{page.MARK} |" in text
    assert row.note in text


def test_a_row_that_is_level_with_its_peers_has_no_note():
    level = dataclasses.replace(OURS, value=1.0)
    assert not any(row.note for row in notes.explained([level, PEER]))


def test_a_row_above_the_floor_says_why_without_a_peer_too():
    row = dataclasses.replace(OURS, name="memory/mlp/adamw/gpu/apply_gradients")
    (said,) = notes.explained([row])
    assert "a gradient tree" in said.note
    (level,) = notes.explained([dataclasses.replace(row, value=1.03)])
    assert not level.note
    (unknown,) = notes.explained(
        [dataclasses.replace(row, name="memory/mlp/adamw/gpu/train_step")]
    )
    assert "not known" in unknown.note


def test_two_rows_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="memory/mlp"):
        results.save([OURS, OURS], FACTS, tmp_path / "x.json")


def test_a_later_part_keeps_the_rows_before(tmp_path):
    path = tmp_path / "x.json"
    results.save([OURS, PEER], FACTS, path)
    again = dataclasses.replace(OURS, value=1.0)
    now = FACTS | {"seconds": 5, "quick": True}
    rows, facts = run.merged([again], now, path)
    assert rows == [again, PEER]
    assert facts == FACTS | {"seconds": 5 + FACTS["seconds"], "quick": True}


def test_no_row_runs_what_the_fingerprint_leaves_out():
    folder = pathlib.Path(run.__file__).parent
    for path in folder.glob("*.py"):
        if path.name == "plan.py":  # measures `accumax.plan`, and gives no row
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "accumax":
                assert node.attr not in results.INSTRUMENTS, path
            elif isinstance(node, ast.ImportFrom) and node.module:
                package, *room = node.module.split(".")
                named = {*room, *(alias.name for alias in node.names)}
                assert package != "accumax" or not named & {*results.INSTRUMENTS}, path
