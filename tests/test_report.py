"""report.html depends on a run's folder alone and loads nothing from outside; pages of evaluate.py."""

import argparse
import html
import json
import re
import shutil
import subprocess
import types
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import checkpoint
import report

PACE = dict(ms=200.0, images_s=80.0, waiting=0.03, gib=0.5)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def write_run(folder, name="stage3", steps=101, images=True, **terms):
    """Write a log with lines of steps 0, 10, .. 100, and its image."""
    args = dict(steps=steps, w=dict(rec=1.0, orth=0.1), data=None)
    header = dict(revision="abc", torch="2", machine="a chip", args=args)
    terms = terms or dict(rec=lambda s: 1 - s / 200, real=lambda s: s / 50, fake=lambda s: -s / 50)
    lines = [dict(step=s) | {k: f(s) for k, f in terms.items()} | PACE for s in range(0, 101, 10)]
    (folder / f"log_{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *lines]))
    if images:
        rows = np.random.default_rng(0).integers(0, 255, (2, 4, 32, 32, 3), np.uint8)
        report.image_grid(list(rows), ["source", "result"], 128).save(folder / f"{name}.png")


def page_of(folder) -> str:
    return report.write_report(folder).read_text()


class Tags(HTMLParser):
    """Checks that tags are closed in order; collects attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.shown = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in ("meta", "img", "br", "p", "tr", "td", "th", "html"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("p", "html"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.shown.append(data)


def check_page(text):
    """Tags are nested, nothing is loaded, every value is a number."""
    tags = Tags(text)
    assert not tags.open
    assert not re.search(r"\b(NaN|nan|inf|None)\b", "".join(tags.shown))
    assert not any(tag in ("script", "link", "iframe", "object") for tag, *_ in tags.attributes) and "<script" not in text
    for tag, name, value in tags.attributes:
        assert name not in ("src", "href", "srcset", "data") or value.startswith("data:image/jpeg;base64,"), value
        assert "nan" not in (value or "") or tag in ("meta", "img")
    assert re.findall(r"https?://[^\"'\s]+", text) == ["http://www.w3.org/2000/svg"] * text.count("<svg")  # a namespace
    assert "url(" not in text and "@import" not in text
    return tags


def test_a_page_shows_progress_last_values_options_and_healthy_values(tmp_path):
    write_run(tmp_path, steps=1101)
    text = page_of(tmp_path)
    shown = " ".join(check_page(text).shown)
    assert "step 100 of 1,101, 0.3 min so far, 200 ms, 80 images/s, 3 % waiting, 0.5 GiB, 3.3 min left" in shown
    assert "refresh" in text                                        # time is left: 1000 steps of .2 s
    assert "a chip" in shown and "rec=1.0, orth=0.1" in shown and "data" not in re.findall(r"<th>(\w+)", text)
    assert re.search(r"<b>rec</b> 0.5<", text) and report.HEALTHY["rec"] in shown
    assert re.search(r"<b>real</b> 2, <b>fake</b> -2<", text)       # in one chart
    assert text.count("<svg") == 2 and text.count("data:image/jpeg") == 1


def test_a_finished_run_has_no_time_left_and_its_time_is_the_sum_of_its_steps(tmp_path):
    write_run(tmp_path)
    text = page_of(tmp_path)
    assert "0.3 min so far" in text and "min left" not in text and "refresh" not in text   # 100 steps of .2 s


def test_a_curve_goes_from_the_first_value_to_the_last_on_the_labelled_axis():
    svg = report.line_chart(dict(a=[(0, 1.0), (50, 2.0), (100, 3.0)]), 300, 130)
    xy = np.array([p.split(",") for p in re.search(r'points="([^"]+)"', svg).group(1).split()], float)[:3]
    assert np.allclose(np.diff(xy[:, 0]), xy[1, 0] - xy[0, 0]) and np.allclose(np.diff(xy[:, 1]), xy[1, 1] - xy[0, 1])
    assert xy[2, 1] < xy[0, 1] and re.findall(r">([\d.]+)</text>", svg) == ["1", "2", "3"]
    svg = report.line_chart(dict(a=[(0, 100.0), (1, 10.0), (2, 1.0)]), 300, 130)                # 100 times: logarithmic
    y = [float(p.split(",")[1]) for p in re.search(r'points="([^"]+)"', svg).group(1).split()]
    assert abs(y[0] - 2 * y[1] + y[2]) < 0.11 and re.findall(r">([\d.]+)</text>", svg) == ["1", "10", "100"]


def test_a_single_point_or_a_constant_is_in_the_middle():
    for points in ([(0, 5.0)], [(0, 5.0), (10, 5.0)]):
        svg = report.line_chart(dict(a=points), 300, 130)
        assert {p.split(",")[1] for p in re.search(r'points="([^"]+)"', svg).group(1).split()} == {"58.0"}


def test_a_long_log_is_sampled_with_its_last_line_and_its_rare_lines(tmp_path):
    rows = [dict(step=s, a=s, ms=1) for s in range(20_000)]
    rows[7777:7777] = [dict(step=7777, val=3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [dict(args=dict(steps=9)), *rows]))
    header, lines = report.read_log(tmp_path / "log.jsonl")
    assert header["args"] == dict(steps=9) and lines[-1]["step"] == 19_999 and dict(step=7777, val=3) in lines
    steps = [line["step"] for line in lines]
    assert 400 < len(steps) < 600 and max(np.diff(steps)) <= 50


@pytest.mark.parametrize("content", [
    "", "\n", '{"args": {"steps": 5}}\n', '{"args": {}}\n{"step": 0, "rec": NaN}\n', "[1]\nx",
    '{"args": {"steps": 5}}\n{"step": 0, "rec": 1e999, "ms": 3}\n', '{"step": null}\n{"st'])
def test_an_empty_incomplete_or_odd_log_still_gives_a_page(tmp_path, content):
    (tmp_path / "log_stage1.jsonl").write_text(content)
    assert "stage1" in "".join(check_page(page_of(tmp_path)).shown)


def test_a_folder_without_a_log_is_an_error_of_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        report.run(report.main)
    assert capsys.readouterr().err == f"report.py: {tmp_path}: no log_*.jsonl in it\n"


def test_no_log_gives_a_page_and_a_damaged_image_is_skipped(tmp_path):
    check_page(page_of(tmp_path))
    write_run(tmp_path, images=False)
    whole = (tmp_path / "whole.png")
    Image.new("RGB", (64, 64)).save(whole)
    for content in (b"no image", whole.read_bytes()[:60]):
        (tmp_path / "stage3.png").write_bytes(content)
        assert "<img" not in page_of(tmp_path)


def test_lines_that_a_resumed_run_writes_again_replace_the_old_ones(tmp_path):
    rows = [dict(args=dict(steps=50)), dict(step=0, a=1), dict(step=10, a=2), dict(step=20, a=3), dict(step=20, val=4),
            dict(args=dict(steps=90)), dict(step=10, a=5)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    header, lines = report.read_log(tmp_path / "log.jsonl")
    assert header["args"] == dict(steps=90) and lines == [dict(step=0, a=1), dict(step=10, a=2), dict(step=10, a=5)]


def test_all_text_is_escaped(tmp_path):
    evil = "<script>alert('&\"')</script>"
    folder = tmp_path / "a <b> & 'c'"
    folder.mkdir()
    (folder / "log_<i>.jsonl").write_text(json.dumps(dict(args={evil: evil, "surrogate": "\udc80"}, machine=evil)) + "\n"
                                          + json.dumps({"step": 1, evil: 2.0, **PACE}) + "\n")
    tags = check_page(page_of(folder))
    assert "".join(tags.shown).count(evil) == 5 and "a <b> & 'c'" in tags.shown
    assert html.escape(evil) in report.html_table({evil: {evil: evil}})


def test_a_page_is_complete_at_any_moment_and_a_failed_write_does_not_end_the_run(tmp_path, monkeypatch):
    write_run(tmp_path)
    before = page_of(tmp_path)

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report.Path, "write_text", full)
        report.write_report(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)                # the draft is written, the old page is still there
        report.write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == before
    assert not list(tmp_path.glob(".*"))                   # no draft
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(report.InputError, match="folder.html: cannot be written"):
        report.write_toy_page(tmp_path / "folder.json", dict(a=dict(open=1.0)), [])


def test_training_updates_the_page_with_each_line_of_its_log(tmp_path):
    bar = types.SimpleNamespace(write=print)
    with checkpoint.open_log(tmp_path / "log_stage2.jsonl", argparse.Namespace(resume=False, steps=31)) as log:
        for step in (10, 20):
            checkpoint.write_log(log, bar, dict(step=step, rec=1 / step, **PACE), 31)
            text = (tmp_path / "report.html").read_text()
            assert f"step {step} of 31" in text and f"<b>rec</b> {1 / step:.3g}<" in text
    assert "threads" in text                               # the machine


def test_every_logged_term_has_a_caption():
    from train import WEIGHTS
    terms = set(WEIGHTS) - {"mouth", "eyes"}               # boxes of rec
    assert terms | {"d", "real", "p", "position", "mse", "r", "in_sync", "val_accuracy"} <= set(report.HEALTHY)


def test_an_image_grid_has_labels_above_sharp_pixels():
    dots = np.zeros((2, 4, 4, 3), np.uint8)
    dots[0, 1, 2], dots[1, 3, 0] = 255, 200
    labels = ["one row", ["a", "a name that is longer than its image"]]
    grid = np.asarray(report.image_grid([list(dots), list(dots)], labels, 64))
    assert grid.shape == (2 * (64 + 18), 128, 3)
    assert (grid[18 + 16:18 + 32, 32:48] == 255).all() and (grid[18 + 48:18 + 64, 64:80] == 200).all()
    assert (grid[18:82] == 255).all(-1).sum() == 256       # nothing else is drawn
    for top, width in ((0, 20), (82, 64)):
        assert grid[top:top + 18, :width].max() > 150      # the labels


def pair(name, ssim, lmd):
    return dict(name=name, frames=3, notes=[], real={}, fake={"SSIM": ssim, "LMD": lmd})


def test_the_page_of_pairs_has_the_table_and_the_frames_of_the_best_and_the_worst(tmp_path, monkeypatch):
    columns = {name: dict(better=better, what=what, heading=heading) for name, better, what, heading in
               (("SSIM", "higher", "likeness", "SSIM ↑"), ("LMD", "lower", "<distance>", "LMD, px ↓"))}
    content = dict(rows=dict(real=dict(SSIM=1, LMD=0), fake=dict(SSIM=0.7, LMD=2)), columns=columns, notes=["a <note>"],
                   pairs=[pair("middle", 0.7, 2.0), pair("good", 0.9, 1.0), pair("bad", 0.5, 3.0),
                          dict(name="broken", error="no")])
    content["columns"]["CSIM"] = dict(better="higher", what="person", heading="CSIM ↑")
    content["pairs"][1]["fake"]["CSIM"] = 0.9              # the remaining pairs lack it and do not gain by it
    shown = []
    frames = [np.zeros((20, 30, 3), np.uint8)] * 9
    monkeypatch.setattr(report, "read_video", lambda path: shown.append(path) or iter(frames))
    files = {k: (f"{k}/real.mp4", f"{k}/fake.mp4") for k in ("middle", "good", "bad")}
    report.write_pairs_page(tmp_path / "n.json", content, files)
    tags = check_page((tmp_path / "n.html").read_text())
    assert shown == ["good/real.mp4", "good/fake.mp4", "bad/real.mp4", "bad/fake.mp4"]
    shown_names = [text for text in tags.shown if text in ("good", "middle", "bad", "The best: good", "The worst: bad")]
    assert shown_names == ["good", "middle", "bad", "The best: good", "The worst: bad"]
    assert {"a <note>", "LMD, px ↓"} <= set(tags.shown)
    assert ("div", "style", "width:56%") in tags.attributes and ("div", "style", "width:33%") in tags.attributes


def test_the_page_of_the_control_table_has_the_matrix_and_the_image_of_stage_3(tmp_path):
    write_run(tmp_path)
    numbers = {"real frames": dict(open=0.98), "w.pt": dict(open=0.97), "w.pt matrix": dict(face=dict(lips=0.15))}
    report.write_toy_page(tmp_path / "table.json", numbers, [tmp_path / "w.pt", tmp_path / "v.pt"])
    text = (tmp_path / "table.html").read_text()
    check_page(text)
    assert text.count("<table") == 2 and text.count("<img") == 1 and "0.150<div class=bar style='width:15%'>" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_an_error_or_a_request(tmp_path, width):
    write_run(tmp_path, name="stage1")
    write_run(tmp_path)
    page = report.write_report(tmp_path)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
               "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1200", "--hide-scrollbars",
               f"--log-net-log={tmp_path / 'net.json'}", f"--screenshot={tmp_path / 'shot.png'}", page.as_uri()]
    done = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=180)
    assert "CONSOLE" not in done.stderr
    initiators = set(re.findall(r'"initiator":"([^"]*)"', (tmp_path / "net.json").read_text()))
    assert initiators <= {"not an origin"}                  # the browser's own requests; a page's: "null"
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    assert shot.shape[1] == width and (np.abs(shot.astype(int) - (59, 130, 246)).sum(-1) < 30).sum() > 100  # a curve
    assert not (np.abs(shot[:, -4:].astype(int) - shot[0, -1]).max() > 8)  # nothing is cut off on the right
