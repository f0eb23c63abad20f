"""README and docs are true: their commands parse, their files are there, the first command makes the example talk."""

import argparse
import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import halves
import pytest

import sample
from media import InputError, load_audio, read_video

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {page: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def fenced(text):
    """The commands in fenced bash blocks, one after another; a backslash joins lines, && and ; part them."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&;|<>()")
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, ";"]:  # shlex drops # comments
            if set(word) <= set("&;|()"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def script_of(command):
    """-> (name of the script or None, its arguments) of a command"""
    if command[0] == "torchrun":
        command = ["python", *command[next(k for k, word in enumerate(command) if word.endswith(".py")):]]
    for k, word in enumerate(command[:-1]):
        if re.fullmatch(r"(.*/)?python3?", word) and command[k + 1].endswith(".py"):
            arguments = command[k + 2 :]
            stop = next((i for i, a in enumerate(arguments) if set(a) <= set("<>&")), len(arguments))
            return command[k + 1], arguments[:stop]
    return None, []


COMMANDS = list(fenced(README))
SCRIPTS = [(name, arguments) for text in PAGES.values() for name, arguments in map(script_of, fenced(text)) if name]
SCRIPTS = [script for k, script in enumerate(SCRIPTS) if script not in SCRIPTS[:k]]


class Parsed(Exception):
    pass


def parse(name, arguments, monkeypatch):
    """Runs a script as far as its options are understood, with its own checks of them where it has a parse().
    Ends the test with argparse's words where they are not."""
    module = importlib.import_module(Path(name).stem)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if hasattr(module, "parse"):
        return module.parse(arguments)
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        module.main()


def test_commands_are_taken_from_blocks_with_joined_lines_and_without_comments():
    text = "```bash\na && .venv/bin/python x.py \\\n  --n 3  # why\n$ python y.py 'b c' > log\n```\n"
    text += "```\npython no.py\n```\n"
    commands = list(fenced(text))
    assert [command[0] for command in commands] == ["a", ".venv/bin/python", "python"]
    assert [script_of(command) for command in commands[1:]] == [("x.py", ["--n", "3"]), ("y.py", ["b c"])]


def test_the_first_command_is_the_sampler():
    assert SCRIPTS[0][0] == "sample.py"


@pytest.mark.parametrize("name, arguments", SCRIPTS, ids=[f"{name} {' '.join(a)}" for name, a in SCRIPTS])
def test_every_command_is_one_that_its_script_understands(name, arguments, monkeypatch, capsys):
    assert (ROOT / name).is_file(), f"README runs {name}, which is not there"
    try:
        parse(name, arguments, monkeypatch)
    except SystemExit:
        pytest.fail(f"python {name} {' '.join(arguments)}: {capsys.readouterr().err}")
    except InputError as error:
        pytest.fail(f"python {name} {' '.join(arguments)}: {error}")


def test_an_option_that_no_script_has_is_noticed(monkeypatch, capsys):
    for name in sorted({name for name, _ in SCRIPTS}) + ["toyfaces.py", "evaluate.py"]:
        with pytest.raises(SystemExit):
            parse(name, ["--no-such-option", "1"], monkeypatch)
        monkeypatch.undo()


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_file_that_a_page_names_is_there(page):
    """Scripts, examples, links and pip's requirements; weights where a line says that they are shipped"""
    text = PAGES[page]
    named = {ROOT / name for name in re.findall(r"(?<![\w/.-])(?:tests/|docs/)?\w+\.py\b", text)}
    named |= {ROOT / name for name in re.findall(r"(?<!\.\./)\bexamples/[\w./-]*\w", text)}
    named |= {page.parent / link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link}
    named |= {ROOT / command[k + 1] for command in fenced(text) for k, word in enumerate(command[:-1]) if word == "-r"}
    for line in text.splitlines():
        if re.search(r"\bship(s|ped)?\b|\bcomes? with\b|\btrained (on|in)\b", line):
            named |= {ROOT / name for name in re.findall(r"\bweights/[\w./-]*\w", line)}
    missing = sorted(str(name) for name in named if not name.exists())
    assert not missing, f"{page.name} names what is not there: {missing}"


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.split()) <= 1600


def test_the_first_command_makes_the_example_talk(tmp_path, monkeypatch):
    arguments = [*SCRIPTS[0][1], "--out", str(tmp_path / "talk.mp4"), "--device", "cpu"]
    monkeypatch.chdir(ROOT)
    args = sample.parse(arguments)
    if not sample.TOY_WEIGHTS.exists():
        pytest.skip(f"{sample.TOY_WEIGHTS} is not there: train it as the README says")
    sample.main(arguments)
    frames = list(read_video(tmp_path / "talk.mp4"))
    seconds = len(load_audio(args.speech)) / 16000
    assert len(frames) == round(25 * seconds) and frames[0].ndim == 3
    assert max(int(abs(frame.astype(int) - frames[0]).max()) for frame in frames) > 40  # it moves


def test_ci_runs_the_readmes_test_command():
    ci = ROOT / ".ci" / "run"
    text = ci.read_text()
    pattern = re.search(r"grep -m1 -oE '([^']+)' README\.md", text).group(1)
    command = re.search(pattern, README, re.MULTILINE).group()
    assert os.access(ci, os.X_OK) and "requirements.txt" in text
    words = shlex.split(command, comments=True)
    assert words in COMMANDS, f"{command}: not in a bash block of the README"
    assert words == [".venv/bin/python", "tests/halves.py"]
    assert set(halves.FIRST) <= {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
