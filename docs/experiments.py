"""Five small ablations for docs/read.md: 150 steps of stage 3 of the documented run with one change.

    python -m docs.experiments out/toy32    # after the documented run; 25 minutes of one core -> docs/experiments.png

Prints the control table on 12 held-out people. Each column of the picture is one trial: the face of one person, the sound
of a second and the head of a third, in the frame with the second person's widest mouth opening.
"""

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np

import control
import fusion
import train
from media import to_uint8
from report import image_grid, markdown_table

STEPS, PEOPLE, COLUMNS = "150", 12, 8


def zero_maps(forward):
    """IdentityMaps of zeros: the code alone shows the generator the person."""
    def forward_zeros(self, w_plus):
        maps, *rest = forward(self, w_plus)
        return [0 * x for x in maps], *rest
    return forward_zeros


EXPERIMENTS = {  # name: options of train.py, replacements in the code
    "as documented": ([], {}),
    "orthogonality off": (["--w", "orth=0"], {}),
    "sync loss off": (["--w", "sync=0"], {}),
    "mouth mask off": ([], {"fusion.mask_mouth": lambda frames, *template: frames}),
    "the paper's motion encoder": (["--motion", "paper"], {}),
    "no identity maps": ([], {"fusion.IdentityMaps.forward": zero_maps(fusion.IdentityMaps.forward)}),
}


def run_experiment(name: str, run32: Path, test) -> tuple[dict, list]:
    """Train and evaluate one experiment -> its row of the control table, one frame of each trial."""
    options, replacements = EXPERIMENTS[name]
    out = run32 / "experiments" / name.replace(" ", "_").replace("'", "")
    out.mkdir(parents=True, exist_ok=True)
    for file in ("stage2.pt", "sync.pt"):
        shutil.copy(run32 / file, out / file)
    if not (out / "toys").exists():
        (out / "toys").symlink_to((run32 / "toys").resolve())
    frames, widest = [], test.truth[..., control.FACTOR_INDEX["open"]].argmax(1)
    with ExitStack() as stack:
        for target, replacement in replacements.items():
            stack.enter_context(patch(target, replacement))
        if not (out / "weights.pt").exists():
            train.main(["--stage", "3", "--steps", STEPS, "--out", str(out), "--overwrite", *options])
        animate = control.animator(fusion.load_model(out / "weights.pt"), "cpu")

        def animate_and_keep_frame(face, wav, driving):
            clip = animate(face, wav, driving)
            frames.append(to_uint8(clip[widest[(len(frames) + 1) % PEOPLE]]))
            return clip

        return control.control_table(animate_and_keep_frame, test), frames


def main(run32: Path):
    test = control.prepare_toy_test(32, PEOPLE, str(run32.parent / "evaluate"), "cpu")
    widest = test.truth[..., control.FACTOR_INDEX["open"]].argmax(1)

    def real_frames(offset, frame_numbers):
        return [test.pack.frame((a + offset) % PEOPLE, frame_numbers[(a + 1) % PEOPLE]) for a in range(PEOPLE)]

    rows = {"face": real_frames(0, np.zeros(PEOPLE, int)), "sound: the mouth to be made": real_frames(1, widest),
            "head: pose and eyes to be made": real_frames(2, widest)}
    table = {}
    for name in EXPERIMENTS:
        table[name], rows[name] = run_experiment(name, run32, test)
    image_grid([row[:COLUMNS] for row in rows.values()], list(rows), 128).save(Path(__file__).parent / "experiments.png")
    print(markdown_table(table))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
