"""The web page for sample.py: it makes the same videos, has limits, and reports errors in one line."""

import sys

import numpy as np
import pytest

import demo
from media import InputError, read_video, write_wav
from sample import TOY_PHOTO


@pytest.fixture
def speech(tmp_path):
    write_wav(tmp_path / "speech.wav", np.random.default_rng(0).normal(0, 0.1, 640 * 7).astype(np.float32))
    return str(tmp_path / "speech.wav")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "shown"))     # main changes it; this restores it after the test


def test_without_gradio_the_error_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match="pip install gradio"):
        demo.main([])


def test_the_video_is_written_to_the_folder_with_the_length_of_the_speech(speech, tmp_path):
    out = demo.make_video(str(tmp_path), str(TOY_PHOTO), speech, None, 1.0, "crop")
    assert out.startswith(str(tmp_path)) and len(list(read_video(out))) == 7


def test_a_missing_file_and_long_speech_are_refused(speech, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="are needed"):
        demo.make_video(str(tmp_path), None, speech, None, 1.0, "whole")
    monkeypatch.setattr(demo, "MAX_SECONDS", 0.2)
    with pytest.raises(InputError, match="at most 0.2"):
        demo.make_video(str(tmp_path), str(TOY_PHOTO), speech, None, 1.0, "whole")


def test_the_page_shows_an_error_in_one_line_without_folders(speech, tmp_path):
    gradio = pytest.importorskip("gradio", reason="gradio is optional")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "note.txt").write_text("no picture")
    blocks = demo.build_page(gradio, str(tmp_path))
    talk = next(f.fn for f in blocks.fns.values() if f.fn and f.fn.__name__ == "talk")
    with pytest.raises(gradio.Error) as error:
        talk(str(tmp_path / "deep" / "note.txt"), speech, None, 1.0, "whole")
    assert error.value.message.startswith("note.txt: ") and "\n" not in error.value.message
