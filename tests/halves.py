"""All tests in two processes of one thread each: on two cores little more than half the time of `python -m pytest`.

    python tests/halves.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FIRST = "train ranks media sample checkpoint report dub warp".split()  # as long as all the others


def main():
    """The first half's output as it comes, then the second's. Ends with the larger exit status: 5 where no test ran."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    halves = [[f for f in files if (f.stem[len("test_"):] in FIRST) == first] for first in (True, False)]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    with tempfile.TemporaryFile() as log:
        runs = [subprocess.Popen([sys.executable, "-m", "pytest", *map(str, half)], env=env,
                                 stdout=out, stderr=out) for half, out in zip(halves, (None, log))]
        status = max(run.wait() for run in runs)
        log.seek(0)
        sys.stdout.buffer.write(log.read())
    sys.exit(status)


if __name__ == "__main__":
    main()
