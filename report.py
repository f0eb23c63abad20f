"""report.html: curves, images, options and speed of a run in one file beside its logs, without scripts or links.

    python report.py docs/run32      # writes docs/run32/report.html from log_*.jsonl and *.png    (1 second)

Training updates it with each line of its log. evaluate.py writes a similar page beside its --json file.
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

PACE_KEYS = ("step", "ms", "images_s", "waiting", "gib")  # of a log line; the remaining keys are curves
SHARED_CHARTS = (("real", "fake"), ("in_sync", "shifted", "other"))  # curves drawn in one chart
COLOURS = ("#3b82f6", "#ef6c4d", "#2fa36b", "#a974d8", "#d9960a", "#808890", "#17a2a2")  # legible on white and on black
MAX_LOG_LINES = 500   # read from a log, so that the page of a long run takes no longer
# captions: healthy values of the weighted losses that train.py and pcavs.py log, and of other columns
HEALTHY = dict(
    rec="Reconstruction. Falls throughout, at a decreasing rate.",
    id="Identity. Close to 0 after a quarter of the run.",
    preserve="Change of the face outside the mouth when the mouth changes. Falls.",
    mouth_cycle="Mouth code read from the image against the input code. Falls.",
    orth="Orthogonality. Below 0.01.",
    sync="Lips fit the sound. Falls towards 0.",
    adv="Stays at one scale, neither near 0 nor rising without end.",
    d="Discriminator's loss. 0.3 to 1.4. Constant 1.386: it cannot discriminate. Near 0: the generator has lost.",
    real="Discriminator's mean scores. A few units from zero and apart, real above fake.",
    r1="R1 penalty. Small and bounded.",
    path="Path length. Falls within 100 steps, then stays small.",
    p="Probability of augmentation. Rises only where the discriminator overfits.",
    loss="Falls from 0.693, which is chance.",
    in_sync="All fall from about 0.69 and stay near each other.",
    contrast="True sound against those of the batch. Falls.",
    scale="Scale of the logits. Rises from 5 to 20 and more.",
    bias="Bias of the logits. Falls below 0, since most pairs do not fit.",
    val_accuracy="Held-out windows of 0.2 s, chance 0.5. 0.96 on toy people, 0.85 on one real speaker.",
    val_second="Accuracy over a second. Above 0.98.",
    val_loss="Falls. Where it rises, the expert overfits (the best one is kept).",
    mse="Held-out clips. Falls. Where it rises, the network overfits (the best ones are kept).",
    r="Correlation of the mouth opening on held-out clips. 0.97 on toy people, 0.92 on one real speaker.",
    lag="Lag in frames. 0 soon.",
    std_ratio="Motion of the mouth over the true motion. Close to 1; below 0.7 the mouth moves too little.",
    silence="Mouth opening in silence, % of the eye distance. Towards 0.",
    best="Lowest mse so far. Never rises.",
    cross="Distance between the sound's code and the mouth's. Falls.",
    pose="Distance between the pose code and its teacher. Falls towards 0.",
    **dict.fromkeys("feat vgg lpips arcface l2 velocity position".split(), "Falls throughout."),
    **dict.fromkeys("val_offset_window val_offset_1s val_offset_3s val_offset_clip".split(),
                    "Share of offsets right within one frame. Rises, for a clip to 1."))
STYLE = """:root{color-scheme:light dark}body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;padding:12px;
max-width:1240px}h1{font-size:22px}h2{margin:28px 0 4px;font-size:18px}p{margin:4px 0}h1,h2,p{overflow-wrap:anywhere}
figure{margin:0}figcaption,small{font-size:13px;opacity:.8}svg,img{width:100%;display:block}summary{cursor:pointer}
.charts{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(270px,1fr));margin:12px 0}
.wide{overflow-x:auto}.wide img{min-width:720px;max-width:1024px}table{border-collapse:collapse;font-size:13px}
td,th{padding:3px 10px 3px 4px;text-align:left;vertical-align:top;border-bottom:1px solid #8885}
.bar{height:4px;background:#3b82f6;margin-top:2px}"""


# ---------------------------------------------------------------------------------------- a folder of logs -> its page

def write_report(folder: str | Path) -> Path:
    """Write FOLDER/report.html: its logs, the latest first, each with its image (stage1.png for log_stage1.jsonl). An
    error in writing (a full disk, a browser's lock) does not end a run."""
    page = Path(folder).absolute() / "report.html"
    with contextlib.suppress(OSError, InputError):
        logs = sorted(page.parent.glob("log_*.jsonl"), key=lambda log: (-log.stat().st_mtime, log.name))
        write_page(page, page.parent.name, [log_section(log, *read_log(log)) for log in logs])
    return page


def read_log(path: Path) -> tuple[dict, list[dict]]:
    """Read a log -> its last header, its lines by increasing step. A resumed run replaces the first run's later steps."""
    header, lines, rows = {}, [], path.read_text(errors="replace").splitlines()
    for k, row in enumerate(rows):
        # read a sample of the lines, the last one, and the rare lines without a pace
        if k % (1 + len(rows) // MAX_LOG_LINES) and '"ms"' in row and k < len(rows) - 1:
            continue
        with contextlib.suppress(ValueError):              # an incomplete line
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
    """HTML of one log: progress, curves, image and options."""
    name, args, charts = path.stem.removeprefix("log_"), header.get("args", {}), {}
    for key in dict.fromkeys(key for line in lines for key in line if key not in PACE_KEYS):
        points = [(line["step"], line[key]) for line in lines if is_finite(line.get(key))]
        if points:
            chart = next((keys[0] for keys in SHARED_CHARTS if key in keys), key)
            charts.setdefault(chart, {})[key] = points
    figures = ""
    for chart, series in charts.items():
        values = ", ".join(f"<b>{escape(key)}</b> {points[-1][1]:.3g}" for key, points in series.items())
        caption = escape(HEALTHY.get(chart, ""))
        figures += f"<figure>{values}{line_chart(series, 300, 130)}<figcaption>{caption}</figcaption></figure>"
    options = {key: value for key, value in (header | args).items() if key != "args" and value is not None}
    rows = "".join(f"<tr><th>{escape(key)}<td>{escape(value)}" for key, value in options.items())
    return (f"<h2>{escape(name)}</h2><p>{escape(describe_progress(lines, args.get('steps')))}<br><small>"
            f"{escape(header.get('machine', ''))}</small>"
            f"<div class=charts>{figures}</div>{embed_image(path.with_name(f'{name}.png'))}"
            f"<details><summary>Options and versions</summary><div class=wide><table>{rows}</table></div></details>")


def describe_progress(lines: list[dict], steps: int | None) -> str:
    """Step, time so far and current pace of a run."""
    lines = [line for line in lines if all(is_finite(line.get(key)) for key in PACE_KEYS)]
    if not lines:
        return "no line yet"
    step, starts = lines[-1]["step"], [0] + [line["step"] for line in lines]
    minutes = sum(line["ms"] * (line["step"] - start) for line, start in zip(lines, starts)) / 60000
    return f"step {step:,} of {steps or step:,}, {minutes:.1f} min so far, {describe_pace(lines[-1], steps)}"


def describe_pace(line: dict, steps: int | None) -> str:
    """A log line as text: time per step, images a second, share of waiting for data, memory, time left."""
    left = ((steps or 0) - 1 - line["step"]) * line["ms"] / 60000
    pace = f"{line['ms']:.0f} ms, {line['images_s']:.0f} images/s, {100 * line['waiting']:.0f} % waiting, "
    return pace + f"{line['gib']:.1f} GiB" + (f", {left:.1f} min left" if left > 0 else "")


def machine_name() -> str:
    """Name of the GPU, else of the processor with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")                            # Linux's
    names = [*re.findall("model name.*: (.*)", cpu.read_text() if cpu.exists() else ""), platform.machine()]
    return f"{names[0]}, threads: {torch.get_num_threads()}"


# -------------------------------------------------------------------------------------------------- elements of a page

def escape(value) -> str:
    """Any value as HTML text."""
    return html.escape(", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value))


def line_chart(series: dict, width: float, height: float) -> str:
    """SVG of curves {name: [(step, value), ..]}. The axis is logarithmic if positive values span a factor of 30."""
    values = [value for points in series.values() for _, value in points]
    scale = math.log10 if min(values) > 0 and max(values) > 30 * min(values) else float
    low, high, last_step = scale(min(values)), scale(max(values)), max(points[-1][0] for points in series.values()) or 1
    if low == high:                                        # a constant is drawn in the middle
        low, high = low - 0.5, low + 0.5
    left, right, top, bottom = 56, width - 6, 8, height - 22
    label = '<text font-size="11" fill="currentColor" text-anchor="end"'
    svg = f'{label} x="{right}" y="{height - 5}">step {last_step:,.0f}</text>'
    for share in (0, 0.5, 1):
        y, value = bottom - share * (bottom - top), low + share * (high - low)
        svg += f'<path d="M{left} {y:.1f}H{right}" stroke="#8886"/>'
        svg += f'{label} x="{left - 5}" y="{y + 4:.1f}">{value if scale is float else 10 ** value:.3g}</text>'
    for k, (colour, (name, points)) in enumerate(zip(COLOURS, series.items())):
        xy = [f"{left + (right - left) * step / last_step:.1f},"
              f"{bottom - (bottom - top) * (scale(value) - low) / (high - low):.1f}"
              for step, value in [*points, points[-1]]]    # the last one twice, so that a single point is visible
        svg += f'<polyline points="{" ".join(xy)}" fill="none" stroke="{colour}" stroke-width="1.6" ' \
               'stroke-linecap="round"/>'
        if len(series) > 1:
            svg += f'<text font-size="11" fill="{colour}" x="{left + 58 * k}" y="{height - 5}">{escape(name)}</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{svg}</svg>'


def html_table(rows: dict, full: float | None = None) -> str:
    """HTML of {row: {column: number or text}}. A bar under each number ends at `full` or the column's maximum."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    bar = "<div class=bar style='width:{:.0f}%'></div>"
    largest = {c: max([abs(row[c]) for row in rows.values() if is_finite(row.get(c))], default=0) for c in columns}
    lines = ["<tr><th>" + "".join(f"<th>{escape(c)}" for c in columns)]
    for name, row in rows.items():
        line = f"<tr><th>{escape(name)}"
        for c in columns:
            if is_finite(row.get(c)):
                line += f"<td>{row[c]:.3f}" + bar.format(min(100, 100 * abs(row[c]) / (full or largest[c] or 1)))
            else:
                line += f"<td>{escape(row.get(c) or '')}"
        lines.append(line)
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def markdown_table(rows: dict) -> str:
    """Markdown of {row: {column: number, text or None}}."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[c]:.2f}" if isinstance(row.get(c), (int, float)) else row.get(c) or "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def image_grid(rows: list, labels: list, edge: int) -> Image.Image:
    """Rows of images, uint8 (H, W, 3), each `edge` pixels wide. labels: a text per row, or one per image."""
    height, width = round(edge * rows[0][0].shape[0] / rows[0][0].shape[1]), edge * max(map(len, rows))
    grid = Image.new("RGB", (width, (height + 18) * len(rows)), "#181a22")
    for j, (images, texts) in enumerate(zip(rows, labels)):
        room = (width if isinstance(texts, str) else edge) // 7                        # letters of size 12
        for k, text in enumerate([texts] if isinstance(texts, str) else texts):
            text = text if len(text) <= room else f"..{text[2 - room:]}"
            ImageDraw.Draw(grid).text((k * edge + 4, j * (height + 18) + 2), text, "#dee2ec", font_size=12)
        for k, image in enumerate(map(Image.fromarray, images)):
            method = Image.Resampling.LANCZOS if edge % image.width else Image.Resampling.NEAREST
            grid.paste(image.resize((edge, height), method), (k * edge, j * (height + 18) + 18))
    return grid


def embed_image(image: Image.Image | Path) -> str:
    """HTML of an image or image file; empty if it cannot be read."""
    data = io.BytesIO()
    with contextlib.suppress(OSError):
        image = (Image.open(image) if isinstance(image, Path) else image).convert("RGB")
        image.thumbnail((1024, 4096))
        image.save(data, "JPEG", quality=85)
        code = base64.b64encode(data.getvalue()).decode()
        return f"<div class=wide><img alt='' src='data:image/jpeg;base64,{code}'></div>"
    return ""


def write_page(path: Path, title: str, sections: list[str]):
    """Write an HTML page. Browsers reload it every 30 s while a run has time left. InputError: it cannot be written."""
    reload = "<meta http-equiv=refresh content=30>" if any("min left<" in section for section in sections) else ""
    content = ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
               f"{reload}<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>{''.join(sections)}"
               f"<p><small>written {time.strftime('%Y-%m-%d %H:%M:%S')}</small></html>\n")
    with atomic_write(path) as draft:
        draft.write_text(content, encoding="utf-8", errors="backslashreplace")


# ------------------------------------------------------------------------------- pages of evaluate.py, beside its JSON

def rank_pairs(pairs: dict, columns: dict) -> list[str]:
    """Names of pairs by mean rank over all metrics, the best first. A pair that lacks a metric comes last in it."""
    rank_sum = dict.fromkeys(pairs, 0)
    for metric, column in columns.items():
        if column["better"] == "as real":                  # "motion" measures it
            continue
        sign = -1 if column["better"] == "higher" else 1
        values = {k: sign * abs(float(pair["fake"][metric])) for k, pair in pairs.items() if metric in pair["fake"]}
        for rank, name in enumerate(sorted(pairs, key=lambda name: values.get(name, math.inf))):
            rank_sum[name] += rank
    return sorted(rank_sum, key=rank_sum.get)


def write_pairs_page(path: Path, report: dict, files: dict):
    """Page of `evaluate.py pair`: the table, the values of each pair, frames of the best and the worst pair. report:
    content of the JSON file `path`. files: {name of a pair: (real, fake)}."""
    columns = report["columns"]
    pairs = {pair["name"]: pair for pair in report["pairs"] if "fake" in pair}
    names = rank_pairs(pairs, columns)

    def table(rows):
        return html_table({name: {column["heading"]: row.get(k) for k, column in columns.items()}
                           for name, row in rows.items()})

    sections = [table(report["rows"]), "<h2>Each pair, the best first</h2>",
                table({name: pairs[name]["fake"] for name in names})]
    for title, name in (("best", names[0]), ("worst", names[-1]))[:len(names)]:
        count = pairs[name]["frames"]
        shown = {int((i + 0.5) * count / 6) for i in range(6)}
        rows = [[frame for k, frame in enumerate(islice(read_video(file), count)) if k in shown] for file in files[name]]
        grid = image_grid(rows, [str(file) for file in files[name]], 170)
        sections += [f"<h2>The {title}: {escape(name)}</h2>", embed_image(grid)]
    notes = report["notes"] + [f"{metric}: {column['what']}" for metric, column in columns.items()]
    write_page(path.with_suffix(".html"), path.stem, sections + [f"<p><small>{escape(note)}</small>" for note in notes])


def write_toy_page(path: Path, report: dict, weights: list):
    """Page of `evaluate.py toy`: the control table, the matrices, and stage 3's image beside each weights file."""
    matrices = {name: rows for name, rows in report.items() if isinstance(next(iter(rows.values())), dict)}
    main_rows = {name: row for name, row in report.items() if name not in matrices}
    sections = ["<p>Correlations with the truth: 1 is perfect. The first row is the probe on real frames, an upper "
                "limit. Wrong sound and driving mouth belong near 0. A matrix: change one input (row), see what moves "
                "(column).", html_table(main_rows, 1) if main_rows else ""]
    sections += [f"<h2>{escape(name)}</h2>{html_table(rows, 1)}" for name, rows in matrices.items()]
    sections += map(embed_image, dict.fromkeys(Path(file).with_name("stage3.png") for file in weights))
    write_page(path.with_suffix(".html"), path.stem, sections)


def main():
    parser = Parser(description="Write report.html of a folder of logs.")
    parser.add_argument("folder", type=Path, help="folder of log_*.jsonl, as training writes them")
    args = parser.parse_args()
    if not [*args.folder.glob("log_*.jsonl")]:
        raise InputError(f"{args.folder}: no log_*.jsonl in it")
    print(write_report(args.folder))


if __name__ == "__main__":
    run(main)
