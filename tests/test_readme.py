"""README and docs are true: their commands parse, their files exist, the first command makes the example talk."""

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


def fenced_commands(text):
    """Yields the commands in fenced bash blocks. A backslash joins lines; && and ; separate commands."""
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
    """A command -> (name of its script, or None; arguments of the script)"""
    if command[0] == "torchrun":
        command = ["python", *command[next(k for k, word in enumerate(command) if word.endswith(".py")):]]
    for k, word in enumerate(command[:-1]):
        if re.fullmatch(r"(.*/)?python3?", word) and command[k + 1].endswith(".py"):
            arguments = command[k + 2 :]
            redirections = [i for i, argument in enumerate(arguments) if set(argument) <= set("<>&")]
            return command[k + 1], arguments[: min(redirections, default=len(arguments))]
    return None, []


COMMANDS = list(fenced_commands(README))
SCRIPTS = []  # (name, arguments) of each different command that runs a script
for text in PAGES.values():
    for script in map(script_of, fenced_commands(text)):
        if script[0] and script not in SCRIPTS:
            SCRIPTS.append(script)


class Parsed(Exception):
    pass


def parse(name, arguments, monkeypatch):
    """Parses the arguments of a script by its parse() with all its checks, or else by argparse in its main(). SystemExit:
    argparse refuses them."""
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
    commands = list(fenced_commands(text))
    assert [command[0] for command in commands] == ["a", ".venv/bin/python", "python"]
    assert [script_of(command) for command in commands[1:]] == [("x.py", ["--n", "3"]), ("y.py", ["b c"])]


def test_the_first_command_is_the_sampler():
    assert SCRIPTS[0][0] == "sample.py"


@pytest.mark.parametrize("name, arguments", SCRIPTS, ids=[f"{name} {' '.join(a)}" for name, a in SCRIPTS])
def test_every_command_is_accepted_by_its_script(name, arguments, monkeypatch, capsys):
    assert (ROOT / name).is_file(), f"README runs {name}, which does not exist"
    try:
        parse(name, arguments, monkeypatch)
    except SystemExit:
        pytest.fail(f"python {name} {' '.join(arguments)}: {capsys.readouterr().err}")
    except InputError as error:
        pytest.fail(f"python {name} {' '.join(arguments)}: {error}")


def test_an_unknown_option_is_detected(monkeypatch, capsys):
    for name in sorted({name for name, _ in SCRIPTS}) + ["toyfaces.py", "evaluate.py"]:
        with pytest.raises(SystemExit):
            parse(name, ["--no-such-option", "1"], monkeypatch)
        monkeypatch.undo()


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_file_that_a_page_names_exists(page):
    """Scripts, examples, links and pip's requirements; weights if the line says that they are shipped"""
    text = PAGES[page]
    named = {ROOT / name for name in re.findall(r"(?<![\w/.-])(?:tests/|docs/)?\w+\.py\b", text)}
    named |= {ROOT / name for name in re.findall(r"(?<!\.\./)\bexamples/[\w./-]*\w", text)}
    named |= {page.parent / link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link}
    for command in fenced_commands(text):
        named |= {ROOT / command[k + 1] for k, word in enumerate(command[:-1]) if word == "-r"}
    for line in text.splitlines():
        if re.search(r"\bship(s|ped)?\b|\bcomes? with\b|\btrained (on|in)\b", line):
            named |= {ROOT / name for name in re.findall(r"\bweights/[\w./-]*\w", line)}
    missing = sorted(str(name) for name in named if not name.exists())
    assert not missing, f"{page.name} names files that do not exist: {missing}"


def test_the_readme_has_at_most_1600_words():
    assert len(README.split()) <= 1600


def test_the_first_command_makes_the_example_talk(tmp_path, monkeypatch):
    arguments = [*SCRIPTS[0][1], "--out", str(tmp_path / "talk.mp4"), "--device", "cpu"]
    monkeypatch.chdir(ROOT)
    args = sample.parse(arguments)
    if not sample.TOY_WEIGHTS.exists():
        pytest.skip(f"{sample.TOY_WEIGHTS} does not exist: train it as the README says")
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
