"""Settings and fixtures that make the tests faster"""

import gc
import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: waiting threads sleep


def pytest_collection_finish():
    """Excludes imported modules from garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """Pack of five toy people at 16 px, 20 frames each"""
    from toyfaces import make_pack
    folder = tmp_path_factory.mktemp("pack") / "toys"
    make_pack(folder, 16, people=5, seconds=0.8, first_seed=50)
    return folder


@pytest.fixture
def refused(capsys):
    """A function that runs a script's main with arguments that it has to refuse -> its one line on stderr"""
    from media import run

    def run_and_read(main, *argv):
        with pytest.raises(SystemExit) as stop:
            run(lambda: main([str(a) for a in argv]))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and "Traceback" not in err
        return err

    return run_and_read
