"""report.html: a run's curves, images, options and speed in one file beside its logs, without scripts or addresses.

    python report.py docs/run32      # docs/run32/report.html from its log_*.jsonl and *.png    (a second)

Training renews it with each line of its log; evaluate.py writes such a page beside its --json.
"""

import base64
import contextlib
import html
import io
import json
import math
import platform
import re
import time
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from media import InputError, Parser, atomic_write, read_video, run

PACE_KEYS = ("step", "ms", "images_s", "waiting", "gib")  # of a log line; the rest are curves
SHARED_CHARTS = (("real", "fake"), ("in_sync", "shifted", "other"))  # curves of one chart
COLOURS = ("#3b82f6", "#ef6c4d", "#2fa36b", "#a974d8", "#d9960a", "#808890", "#17a2a2")  # read on white and on black
MAX_LOG_LINES = 500   # of a log that are read: a page of a long run takes no longer
# of losses in the logs of train.py and pcavs.py, which are times their weights, and other columns
HEALTHY = dict.fromkeys("feat vgg lpips arcface l2 velocity position".split(), "Falls throughout.") | dict(
    rec="Reconstruction: falls throughout, ever more slowly.",
    id="Identity: close to 0 after a quarter of the run.",
    preserve="Another mouth leaves the rest of the face as it is: falls.",
    mouth_cycle="The mouth read from the image is the one asked for: falls.",
    orth="Orthogonality: below 0.01.",
    sync="Lips fit the sound: falls towards 0.",
    adv="Stays of one size, neither near 0 nor rising without end.",
    d="Discriminator's loss: 0.3 to 1.4. 1.386 all the time: it cannot tell. Near 0: the generator has lost.",
    real="Discriminator's mean scores: a few units from zero and apart, real above fake.",
    r1="R1 penalty: small and bounded.",
    path="Path length: falls within 100 steps, then stays small.",
    p="Probability of augmentation: rises only where the discriminator overfits.",
    loss="Falls from 0.693, which is chance.",
    in_sync="All fall from about 0.69 and stay near each other.",
    contrast="The true sound among those of the batch: falls.",
    scale="Of the logits: rises from 5 to 20 and more.",
    bias="Of the logits: falls below 0, since most pairs do not fit.",
    val_accuracy="Held-out windows of 0.2 s, chance 0.5: 0.96 on toy people, 0.85 on one real speaker.",
    val_second="Accuracy over a second: above 0.98.",
    val_loss="Falls; where it rises the expert overfits (the best one is kept).",
    mse="Held-out clips: falls; where it rises the network overfits (the best ones are kept).",
    r="Mouth's opening, held-out clips: correlation 0.97 on toy people, 0.92 on one real speaker.",
    lag="Frames: 0 soon.",
    std_ratio="Motion of the mouth over the true one: close to 1; below 0.7 it moves too little.",
    silence="Opening in silence, % of the eye distance: towards 0.",
    best="Least mse so far: never rises.",
    cross="The sound's code is the mouth's: falls.",
    pose="The pose code follows its teacher: falls towards 0.") | dict.fromkeys(
    [f"val_offset_{k}" for k in ("window", "1s", "3s", "clip")], "Offset right within one frame: rises, of a clip to 1.")
STYLE = """:root{color-scheme:light dark}body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;padding:12px;
max-width:1240px}h1{font-size:22px}h2{margin:28px 0 4px;font-size:18px}p{margin:4px 0}h1,h2,p{overflow-wrap:anywhere}
figure{margin:0}figcaption,small{font-size:13px;opacity:.8}svg,img{width:100%;display:block}summary{cursor:pointer}
.charts{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(270px,1fr));margin:12px 0}
.wide{overflow-x:auto}.wide img{min-width:720px;max-width:1024px}table{border-collapse:collapse;font-size:13px}
td,th{padding:3px 10px 3px 4px;text-align:left;vertical-align:top;border-bottom:1px solid #8885}
.bar{height:4px;background:#3b82f6;margin-top:2px}"""


# ---------------------------------------------------------------------------------------- a folder of logs -> its page

def write_report(folder: str | Path) -> Path:
    """FOLDER/report.html from its logs, the latest first, and the image of each: stage1.png of log_stage1.jsonl. A
    page that cannot be written (a full disk, a browser's lock) does not end a run."""
    page = Path(folder).absolute() / "report.html"
    with contextlib.suppress(OSError, InputError):
        logs = sorted(page.parent.glob("log_*.jsonl"), key=lambda log: (-log.stat().st_mtime, log.name))
        write_page(page, page.parent.name, [log_section(log, *read_log(log)) for log in logs])
    return page


def read_log(path: Path) -> tuple[dict, list[dict]]:
    """-> the last header, and lines by rising steps: a resumed run writes some again. A torn line is left out"""
    header, lines, rows = {}, [], path.read_text(errors="replace").splitlines()
    for k, row in enumerate(rows):
        if k % (1 + len(rows) // MAX_LOG_LINES) and '"ms"' in row and k + 1 < len(rows):
            continue
        with contextlib.suppress(ValueError):
            line = json.loads(row)
            if isinstance(line, dict) and isinstance(line.get("args"), dict):
                header = line
            elif isinstance(line, dict) and is_finite(line.get("step")):
                while lines and lines[-1]["step"] > line["step"]:
                    lines.pop()
                lines.append(line)
    return header, lines


def is_finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def log_section(path: Path, header: dict, lines: list[dict]) -> str:
    """Where a run is, its curves, its image, its options"""
    name, args, charts = path.stem.removeprefix("log_"), header.get("args", {}), {}
    for key in dict.fromkeys(key for line in lines for key in line if key not in PACE_KEYS):
        points = [(line["step"], line[key]) for line in lines if is_finite(line.get(key))]
        if points:
            group = next((names[0] for names in SHARED_CHARTS if key in names), key)
            charts.setdefault(group, {})[key] = points
    figures = ""
    for group, series in charts.items():
        now = ", ".join(f"<b>{escape(key)}</b> {points[-1][1]:.3g}" for key, points in series.items())
        figures += (f"<figure>{now}{line_chart(series, 300, 130)}"
                    f"<figcaption>{escape(HEALTHY.get(group, ''))}</figcaption></figure>")
    options = {k: v for k, v in (header | args).items() if k != "args" and v is not None}
    rows = "".join(f"<tr><th>{escape(k)}<td>{escape(v)}" for k, v in options.items())
    return (f"<h2>{escape(name)}</h2><p>{escape(describe_progress(lines, args.get('steps')))}<br><small>"
            f"{escape(header.get('machine', ''))}</small>"
            f"<div class=charts>{figures}</div>{embed_image(path.with_name(f'{name}.png'))}"
            f"<details><summary>Options and versions</summary><div class=wide><table>{rows}</table></div></details>")


def describe_progress(lines: list[dict], steps: int | None) -> str:
    """The step, the time so far, the pace of the last line"""
    paced = [line for line in lines if all(is_finite(line.get(key)) for key in PACE_KEYS)]
    if not paced:
        return "no line yet"
    last, before = paced[-1], [0] + [line["step"] for line in paced]
    spent = sum(line["ms"] * (line["step"] - step) for line, step in zip(paced, before)) / 60000
    return f"step {last['step']:,} of {steps or last['step']:,}, {spent:.1f} min so far, {describe_pace(last, steps)}"


def describe_pace(line: dict, steps: int | None) -> str:
    """Of a line of a log: the time of a step, images a second, the share of waiting for data, memory, time left"""
    left = ((steps or 0) - 1 - line["step"]) * line["ms"] / 60000
    return (f"{line['ms']:.0f} ms, {line['images_s']:.0f} images/s, {100 * line['waiting']:.0f} % waiting, "
            f"{line['gib']:.1f} GiB") + f", {left:.1f} min left" * (left > 0)


def machine_name() -> str:
    """For the header of a log: the GPU's name, else the processor's"""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [*re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text()), platform.machine()]
    return f"{names[0]}, threads: {torch.get_num_threads()}"


# ----------------------------------------------------------------------------------------------------- parts of a page

def escape(value) -> str:
    """Any value, for HTML"""
    return html.escape(", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value))


def line_chart(series: dict, w: float, h: float) -> str:
    """Curves {name: [(step, value), ..]} in an SVG of w x h; a logarithmic axis where positive values differ 30 times"""
    values = [v for points in series.values() for _, v in points]
    scale = math.log10 if min(values) > 0 and max(values) > 30 * min(values) else float
    low, high, last = scale(min(values)), scale(max(values)), max(points[-1][0] for points in series.values()) or 1
    low, high = (low, high) if high > low else (low - 0.5, low + 0.5)                  # one value: in the middle
    left, right, bottom, words = 56, w - 6, h - 22, '<text font-size="11" fill="currentColor" text-anchor="end"'
    svg = f'{words} x="{right}" y="{h - 5}">step {last:,.0f}</text>'
    for at in (0, 0.5, 1):
        y, value = bottom - at * (bottom - 8), low + at * (high - low)
        svg += f'<path d="M{left} {y:.1f}H{right}" stroke="#8886"/>'
        svg += f'{words} x="{left - 5}" y="{y + 4:.1f}">{value if scale is float else 10 ** value:.3g}</text>'
    for k, (colour, (name, points)) in enumerate(zip(COLOURS, series.items())):
        xy = [f"{left + (right - left) * s / last:.1f},{bottom - (bottom - 8) * (scale(v) - low) / (high - low):.1f}"
              for s, v in [*points, points[-1]]]                                       # twice the last: one point shows
        svg += f'<polyline points="{" ".join(xy)}" fill="none" stroke="{colour}" stroke-width="1.6" ' \
               'stroke-linecap="round"/>'
        if len(series) > 1:
            svg += f'<text font-size="11" fill="{colour}" x="{left + 58 * k}" y="{h - 5}">{escape(name)}</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}">{svg}</svg>'


def html_table(rows: dict, full: float | None = None) -> str:
    """{row: {column: number or text}}; a bar under each number, of full width for `full`, else the column's largest"""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    most = {c: full or max([abs(row[c]) for row in rows.values() if is_finite(row.get(c))], default=0) or 1
            for c in columns}
    lines = ["<tr><th>" + "".join(f"<th>{escape(c)}" for c in columns)]
    for name, row in rows.items():
        cells = [f"{row[c]:.3f}<div class=bar style='width:{min(100, 100 * abs(row[c]) / most[c]):.0f}%'></div>"
                 if is_finite(row.get(c)) else escape(row.get(c) or "") for c in columns]
        lines.append(f"<tr><th>{escape(name)}" + "".join(f"<td>{cell}" for cell in cells))
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def markdown_table(rows: dict) -> str:
    """{row: {column: number, text or None}} -> a table in Markdown"""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[c]:.2f}" if isinstance(row.get(c), (int, float)) else row.get(c) or "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def image_grid(rows: list, words: list, edge: int) -> Image.Image:
    """Rows of images, uint8 (H, W, 3), `edge` pixels wide, each below its words: a text, or one for each image"""
    height, width = round(edge * rows[0][0].shape[0] / rows[0][0].shape[1]), edge * max(map(len, rows))
    grid = Image.new("RGB", (width, (height + 18) * len(rows)), "#181a22")
    for j, (images, names) in enumerate(zip(rows, words)):
        room = (width if isinstance(names, str) else edge) // 7                        # letters of size 12
        for k, name in enumerate([names] if isinstance(names, str) else names):
            short = name if len(name) <= room else f"..{name[2 - room:]}"
            ImageDraw.Draw(grid).text((k * edge + 4, j * (height + 18) + 2), short, "#dee2ec", font_size=12)
        for k, image in enumerate(map(Image.fromarray, images)):
            how = Image.Resampling.LANCZOS if edge % image.width else Image.Resampling.NEAREST
            grid.paste(image.resize((edge, height), how), (k * edge, j * (height + 18) + 18))
    return grid


def embed_image(image: Image.Image | Path) -> str:
    """An image, or a file's; nothing where it cannot be read"""
    data = io.BytesIO()
    with contextlib.suppress(OSError):
        image = (Image.open(image) if isinstance(image, Path) else image).convert("RGB")
        image.thumbnail((1024, 4096))
        image.save(data, "JPEG", quality=85)
        code = base64.b64encode(data.getvalue()).decode()
        return f"<div class=wide><img alt='' src='data:image/jpeg;base64,{code}'></div>"
    return ""


def write_page(path: Path, title: str, sections: list[str]):
    """Browsers read the page again every 30 s, while time is left to a run. InputError: it cannot be written"""
    again = "<meta http-equiv=refresh content=30>" * any("min left<" in section for section in sections)
    content = ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
               f"{again}<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>{''.join(sections)}"
               f"<p><small>written {time.strftime('%Y-%m-%d %H:%M:%S')}</small></html>\n")
    with atomic_write(path) as draft:
        draft.write_text(content, encoding="utf-8", errors="backslashreplace")


# ------------------------------------------------------------------------------- pages of evaluate.py, beside its JSON

def write_pairs_page(path: Path, report: dict, files: dict):
    """`evaluate.py pair`: the table, each pair's values, frames of the pairs of the best and the worst mean rank.
    report: the content of the JSON `path`; files: {name of a pair: (real, fake)}"""
    pairs = {pair["name"]: pair for pair in report["pairs"] if "fake" in pair}
    rank = dict.fromkeys(pairs, 0)
    for metric, column in report["columns"].items():
        if column["better"] == "as real":  # counts in "motion"
            continue
        sign = -1 if column["better"] == "higher" else 1
        values = {k: sign * abs(float(pair["fake"][metric])) for k, pair in pairs.items() if metric in pair["fake"]}
        for k, name in enumerate(sorted(pairs, key=lambda name: values.get(name, math.inf))):
            rank[name] += k
    order = sorted(rank, key=rank.get)
    heads = {k: f"{k} {dict(higher='↑', lower='↓').get(column['better'], '')}" for k, column in report["columns"].items()}
    tables = [html_table({row: {head: values.get(k) for k, head in heads.items()} for row, values in rows.items()})
              for rows in (report["rows"], {name: pairs[name]["fake"] for name in order})]
    sections = [tables[0], "<h2>Each pair, the best first</h2>", tables[1]]
    for which, name in (("best", order[0]), ("worst", order[-1]))[:len(order)]:
        count = pairs[name]["frames"]
        spread = [int((i + 0.5) * count / 6) for i in range(6)]
        rows = [[frame for k, frame in enumerate(islice(read_video(file), count)) if k in spread] for file in files[name]]
        sections += [f"<h2>The {which}: {escape(name)}</h2>",
                     embed_image(image_grid(rows, [*map(str, files[name])], 170))]
    notes = report["notes"] + [f"{name}: {column['what']}" for name, column in report["columns"].items()]
    write_page(path.with_suffix(".html"), path.stem, sections + [f"<p><small>{escape(note)}</small>" for note in notes])


def write_toy_page(path: Path, report: dict, weights: list):
    """`evaluate.py toy`: the control table, what one change moves, stage 3's image beside each file of weights"""
    tables = {name: rows for name, rows in report.items() if isinstance(next(iter(rows.values())), dict)}
    main = {name: row for name, row in report.items() if name not in tables}
    sections = ["<p>Correlations with the truth: 1 is perfect. The first row is the probe on real frames: nothing "
                "generated can be read better. Wrong sound and driving mouth belong near 0. A matrix: change one input "
                "(row), see what moves (column).", *[html_table(main, 1)] * bool(main)]
    sections += [f"<h2>{escape(name)}</h2>{html_table(rows, 1)}" for name, rows in tables.items()]
    sections += map(embed_image, dict.fromkeys(Path(file).with_name("stage3.png") for file in weights))
    write_page(path.with_suffix(".html"), path.stem, sections)


def main():
    parser = Parser(description="report.html of a folder of logs")
    parser.add_argument("folder", type=Path, help="of log_*.jsonl, as a training run writes them")
    args = parser.parse_args()
    if not [*args.folder.glob("log_*.jsonl")]:
        raise InputError(f"{args.folder}: no log_*.jsonl in it")
    print(write_report(args.folder))


if __name__ == "__main__":
    run(main)
