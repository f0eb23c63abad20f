"""Five small experiments of docs/read.md: stage 3 of the documented run with one thing changed.

    python docs/experiments.py out/toy32          # after the documented run; a quarter of an hour on two cores

Each trains 150 steps from the same stage 2 and is measured by the control table on 12 people. The faces of its row in
docs/experiments.png have the head pose and the sound of somebody else. Numbers go to docs/experiments.json.
"""

import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import control  # noqa: E402
import fusion  # noqa: E402
import train  # noqa: E402

STEPS, PEOPLE = "150", 12


def without_maps(forward):
    """IdentityMaps whose maps are zero: the generator gets the person by the code alone"""
    def zero(self, w_plus):
        maps, coarse = forward(self, w_plus)
        return [0 * x for x in maps], coarse
    return zero


EXPERIMENTS = {  # name: options of train.py, and what is replaced in the code
    "as documented": ([], {}),
    "orthogonality off": (["--w", "orth=0"], {}),
    "mouth mask off": ([], {"fusion.mask_mouth": lambda frames, *template: frames}),
    "paper's motion encoder": (["--motion", "paper"], {}),
    "sync loss off": (["--w", "sync=0"], {}),
    "no identity maps": ([], {"fusion.IdentityMaps.forward": without_maps(fusion.IdentityMaps.forward)}),
}


def run(name: str, run32: Path) -> tuple[dict, np.ndarray]:
    """Trains and measures one experiment -> its row of the control table, and the image of its last step"""
    options, replaced = EXPERIMENTS[name]
    out = run32 / "experiments" / name.replace(" ", "_").replace("'", "")
    out.mkdir(parents=True, exist_ok=True)
    for file in ("stage2.pt", "sync.pt"):
        shutil.copy(run32 / file, out / file)
    if not (out / "toys").exists():
        (out / "toys").symlink_to((run32 / "toys").resolve())
    with ExitStack() as stack:
        for where, what in replaced.items():
            stack.enter_context(patch(where, what))
        train.main(["--stage", "3", "--steps", STEPS, "--out", str(out), "--overwrite", *options])
        animate = control.animator(fusion.load_model(out / "weights.pt"), "cpu")
        table = control.control_table(animate, control.toy_test(32, PEOPLE, str(run32.parent / "evaluate"), "cpu"))
    return table, np.array(Image.open(out / "stage3.png").convert("RGB"))


def main(run32: Path):
    rows, numbers = [], {}
    for name in EXPERIMENTS:
        numbers[name], image = run(name, run32)
        third = len(image) // 3                                        # rows of stage3.png: source, driving, result
        if not rows:
            rows += [("source", image[:third]), ("driving", image[third : 2 * third])]
        rows.append((name, image[2 * third :]))
    width = rows[0][1].shape[1]
    sheet = Image.new("RGB", (150 + width, sum(len(image) for _, image in rows)), "white")
    y = 0
    for name, image in rows:
        sheet.paste(Image.fromarray(image), (150, y))
        ImageDraw.Draw(sheet).text((6, y + len(image) // 2 - 6), name, "black")
        y += len(image)
    sheet.save(HERE / "experiments.png")
    (HERE / "experiments.json").write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
