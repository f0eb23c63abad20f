"""Five small experiments of docs/read.md: stage 3 of the documented run with one thing changed.

    python docs/experiments.py out/toy32          # after stages 1 and 2; about 20 minutes on two cores

Each trains 400 steps from the same stage 2, is measured by the control table, and gives the faces of one row of
docs/experiments.png: somebody else's head and sound. Numbers go to docs/experiments.json.
"""

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import evaluate  # noqa: E402
import fusion  # noqa: E402
import train  # noqa: E402

STEPS = "400"


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
    with patch.multiple("fusion", **{}):
        patches = [patch(where, what) for where, what in replaced.items()]
        for p in patches:
            p.start()
        train.main(["--stage", "3", "--steps", STEPS, "--out", str(out), "--overwrite", *options])
        evaluate.main(["toy", str(out / "weights.pt"), "--json", str(out / "table.json")])
        for p in patches:
            p.stop()
    return json.loads((out / "table.json").read_text()), np.array(Image.open(out / "stage3.png").convert("RGB"))


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
    torch.set_num_threads(2)
    main(Path(sys.argv[1]))
