"""Figures of the documentation, written as SVG without a plotting package.

    python -m docs.figures architecture          # docs/architecture.svg
    python -m docs.figures curves docs/run32     # docs/run32/curves.svg from its log_*.jsonl
"""

import sys
from pathlib import Path

from report import line_chart, read_log

HERE = Path(__file__).resolve().parent
COLOURS = dict(data="#fff3d6", net="#dbe9ff", ours="#e2f5df", loss="#fde2e2")
TIP = ('<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
       '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>\n')


def page(w, h, *elements) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" font-family="Helvetica, Arial, sans-serif">\n'
    return head + TIP + f'<rect width="{w}" height="{h}" fill="white"/>\n' + "".join(elements) + "</svg>\n"


def text(x, y, content, size=11, anchor="start", fill="#222", weight="normal") -> str:
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}">'
            f"{content}</text>\n")


def box(x, y, w, title, note, kind) -> str:
    """A rounded box with a title and a note below it: a shape or a file name."""
    frame = f'<rect x="{x}" y="{y}" width="{w}" height="44" rx="7" fill="{COLOURS[kind]}" stroke="#888"/>\n'
    title = text(x + w / 2, y + 19, title, 13, "middle", weight="bold")
    return frame + title + text(x + w / 2, y + 35, note, 11, "middle", "#555")


def arrow(*points, dashed=False) -> str:
    """An arrow along points (x, y)."""
    path, dash = " ".join(f"{x},{y}" for x, y in points), "5 4" if dashed else "none"
    return (f'<polyline points="{path}" fill="none" stroke="#555" stroke-width="1.4" stroke-dasharray="{dash}" '
            'marker-end="url(#tip)"/>\n')


def architecture() -> str:
    return page(
        1120, 430,
        box(10, 30, 130, "source photo", "(B, 3, H, W)", "data"), arrow((140, 52), (220, 52)),
        box(220, 30, 150, "VisualEncoder", "vision.py", "net"),
        arrow((370, 52), (460, 52)), text(381, 46, "z_s (B, L, D)"),
        box(460, 30, 160, "CanonicalEncoder", "fusion.py", "net"),
        arrow((620, 60), (745, 60), (745, 112)), text(632, 76, "z_s2c (B, L, D)"),
        box(10, 130, 130, "speech: mel", "(B, T, 1, 80, 16)", "data"), arrow((140, 152), (220, 152)),
        box(220, 130, 150, "AudioEncoder", "audio.py", "net"),
        arrow((370, 152), (415, 152), (415, 195), (460, 195)), text(418, 146, "z_a (B, T, D)"),
        box(10, 230, 130, "driving video", "(B, T, 3, H, W)", "data"), arrow((140, 252), (220, 252)),
        box(220, 230, 150, "VisualEncoder", "mouth masked: faces.py", "net"),
        arrow((370, 252), (415, 252), (415, 212), (460, 212)), text(378, 270, "z_v (B, T, L, D)"),
        box(460, 180, 160, "TemporalFusion", "+ MotionEncoder: fusion.py", "net"),
        arrow((620, 202), (745, 202), (745, 142)), text(630, 220, "z_c2d (B, T, L, D)"),
        '<circle cx="745" cy="127" r="15" fill="white" stroke="#555"/>', text(745, 132, "+", 14, "middle"),
        box(650, 10, 150, "HyperNetwork", "weight changes", "net"), arrow((800, 32), (875, 32), (875, 105), dashed=True),
        arrow((760, 127), (810, 127)), box(810, 105, 130, "Generator", "stylegan2.py", "net"),
        arrow((940, 127), (1000, 127)), box(1000, 105, 110, "frames", "(B, T, 3, H, W)", "data"),
        arrow((1055, 149), (1055, 210)), box(830, 210, 280, "six losses, three stages", "losses.py, train.py", "loss"),
        arrow((540, 224), (540, 330)), text(548, 285, "lips, from sound alone"),
        box(460, 330, 160, "lip displacements", "opening + 5 numbers", "ours"), arrow((620, 352), (700, 352)),
        box(700, 330, 200, "warp.py", "photo + landmarks.py's 68 points", "ours"), arrow((900, 352), (970, 352)),
        box(970, 330, 140, "talking photo", "at its own size", "data"),
        text(10, 405, "Above: the paper's method, in which the generator paints every frame. Below: ours, the default "
             "for real photos, which moves the photo's own pixels.", 12, fill="#555"),
        text(10, 422, "B clips, T frames, L style layers, D latent width", 12, fill="#555"))


PLOTS = (("sync expert", "log_sync.jsonl", ("loss", "contrast")),
         ("stage 1: StyleGAN2", "log_stage1.jsonl", ("adv", "d", "r1", "path")),
         ("stage 2: inversion", "log_stage2.jsonl", ("rec", "feat", "id")),
         ("stage 3: end to end", "log_stage3.jsonl", ("rec", "feat", "id", "orth", "sync", "adv")))


def curves(folder: Path) -> str:
    """Loss curves of a run: the sync expert and the three stages."""
    charts = []
    for k, (title, name, terms) in enumerate(PLOTS):
        x, y, (_, lines) = 10 + 560 * (k % 2), 40 + 270 * (k // 2), read_log(folder / name)
        series = {term: [(line["step"], line[term]) for line in lines if term in line] for term in terms}
        place = f'<svg x="{x}" y="{y}" width="530" height="220" '
        charts += [text(x + 56, y - 6, title, 13, weight="bold"), line_chart(series, 530, 220).replace("<svg ", place, 1)]
    return page(1120, 560, *charts)


if __name__ == "__main__":
    if sys.argv[1:2] == ["curves"]:
        (Path(sys.argv[2]) / "curves.svg").write_text(curves(Path(sys.argv[2])))
    else:
        (HERE / "architecture.svg").write_text(architecture())
