"""Structure of the code: no circular imports, the method imports no sibling, files and functions stay small."""

import ast
import re
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*.py")}
METHOD = set("audio media report checkpoint faces stylegan2 vision fusion losses judges data initialise warp motion "
             "landmarks sample train".split())
SIBLINGS = {"keypoints", "pcavs", "evaluate", "control", "toyfaces", "prepare"}


def imports(tree, everywhere=False):
    """Names of project files that a file imports at its top; everywhere: also inside functions"""
    names = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & set(ROOMS)


TOP = {room: imports(tree) for room, tree in ROOMS.items()}


def imported_files(room):
    """The file and all project files that it imports, directly or through others"""
    pending, visited = [room], set()
    while pending:
        name = pending.pop()
        if name not in visited:
            visited.add(name)
            pending += TOP[name]
    return visited


def test_there_are_no_circular_imports():
    circular = {room for room in ROOMS if any(room in imported_files(other) for other in TOP[room])}
    assert not circular


def test_files_import_only_files_above_them_in_the_readme():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    order = re.findall(r"`(\w+)\.py`", " ".join(rows))
    assert sorted(order) == sorted(ROOMS)
    for k, room in enumerate(order):
        assert TOP[room] <= set(order[:k]), room


def test_the_method_imports_no_sibling():
    wrong = {room: imports(ROOMS[room], everywhere=True) & SIBLINGS for room in METHOD & set(ROOMS)}
    assert wrong.pop("initialise") <= {"toyfaces"} and "toyfaces" not in TOP["initialise"]  # in one function
    assert not any(wrong.values()), wrong


def test_training_needs_few_files():
    """13 files for networks, data and losses. Not counted: landmarks, motion and warp, which fit the motion of photos
    after the last step, and report, which shows the log"""
    needed = imported_files("train") - {"landmarks", "motion", "warp", "toyfaces", "report"}
    assert len(needed) <= 13, sorted(needed)


def test_every_script_runs_main_by_run_which_reports_errors_in_one_line():
    scripts = [tree for tree in ROOMS.values() if "main" in {getattr(node, "name", "") for node in tree.body}]
    assert len(scripts) > 9
    assert {ast.unparse(tree.body[-1]) for tree in scripts} == {"if __name__ == '__main__':\n    run(main)"}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_files_and_functions_are_short(room):
    source = (ROOT / f"{room}.py").read_text().splitlines()
    assert len(source) <= (450 if room == "train" else 850)
    long = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(ROOMS[room])
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 65}
    assert set(long) <= {"parse", "main"} | {"__init__"}, long  # options, the training loop, layers


def test_train_has_at_most_31_options(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    assert len(set(re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE))) <= 31
