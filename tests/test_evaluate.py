"""Measures against independent computations; the control table against networks whose control is known."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.metrics
import torch

import evaluate
import toyfaces
from audio import log_mel, mel_windows, run
from data import save_checkpoint
from evaluate import (
    READ,
    Probe,
    change_matrix,
    control_table,
    correlation,
    l1,
    markdown,
    probe_row,
    psnr,
    retrieval,
    ssim,
    talker,
)
from toyfaces import FACTORS, TEST, person
from vision import VideoWriter, read_video, to_tensor, to_uint8

LIPS = [FACTORS.index("open"), FACTORS.index("wide")]
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------
# pure functions


def pictures(seed, *shape):
    """Two uint8 pictures that look somewhat alike"""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, shape)
    return a.astype(np.uint8), np.clip(a + rng.normal(8, 25, shape), 0, 255).astype(np.uint8)


def test_correlation_is_that_of_numpy_over_all_axes():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 41))
    b = 0.4 * a + rng.normal(2, 1, a.shape)
    assert correlation(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-12)


def test_correlation_has_the_sign_of_the_slope_and_is_zero_for_a_flat_curve():
    t = np.linspace(0, 3, 17)
    assert correlation(t, 5 * t - 2) == pytest.approx(1)
    assert correlation(t, 4 - 0.1 * t) == pytest.approx(-1)
    assert correlation(t, np.full(17, 0.1)) == 0 and correlation(np.full(17, 0.1), t) == 0


def test_l1_and_psnr_of_a_known_difference():
    a, black = np.full((7, 9, 3), 30, np.uint8), np.zeros((7, 9, 3), np.uint8)
    assert l1(a, black) == pytest.approx(30 / 255) and l1(black, a) == l1(
        a, black
    )  # uint8 does not wrap round
    assert psnr(a, black) == pytest.approx(20 * np.log10(255 / 30)) and psnr(black, a) == psnr(a, black)
    assert l1(a, a) == 0 and psnr(a, a) == float("inf")


def test_psnr_and_ssim_are_those_of_scikit_image():
    a, b = pictures(1, 23, 31, 3)
    assert psnr(a, b) == pytest.approx(
        skimage.metrics.peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9
    )
    wang = dict(
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=255
    )
    assert ssim(a, b) == pytest.approx(skimage.metrics.structural_similarity(a, b, **wang), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1) and 0 < ssim(a, b) < 0.99


def test_retrieval_counts_the_queries_that_find_their_own_row():
    gallery = torch.eye(4, 6)
    assert retrieval(gallery, gallery) == 1
    assert retrieval(gallery[[1, 0, 2, 3]], gallery) == 0.5
    assert retrieval(gallery.roll(1, 0), gallery) == 0
    near = gallery + 0.3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert retrieval(near[:3], gallery[:3]) == sum(int(near[k, :3].argmax()) == k for k in range(3)) / 3


def test_the_table_in_markdown_has_a_row_each_and_two_decimals():
    table = markdown({"real": dict(open=0.987, yaw=1), "out/a.pt": dict(yaw=-0.004, open=0.5)})
    assert table.splitlines() == [
        "| | open | yaw |",
        "|---|---|---|",
        "| real | 0.99 | 1.00 |",
        "| out/a.pt | 0.50 | -0.00 |",
    ]


# ------------------------------------------------------------------------------------------------------------
# the probe


@pytest.mark.parametrize("size", [16, 48])
def test_the_probe_reads_ten_factors_and_a_unit_embedding_from_each_picture_alone(size):
    torch.manual_seed(0)
    probe = Probe(size, width=8).eval()
    x = torch.randn(5, 3, size, size)
    read, who = probe(x)
    assert read.shape == (5, 10) and who.shape == (5, 64)
    torch.testing.assert_close(who.norm(dim=1), torch.ones(5))
    changed = x.clone()
    changed[3] += 1
    same = torch.tensor([0, 1, 2, 4])
    for before, after in zip((read, who), probe(changed)):
        torch.testing.assert_close(before[same], after[same])
        assert not torch.allclose(before[3], after[3])


def test_readings_are_in_the_factors_own_units_and_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    probe = Probe(16, width=8).eval()
    probe.mean.copy_(torch.arange(10.0))
    probe.std.copy_(torch.linspace(0.5, 9, 10))
    x = torch.randn(7, 3, 16, 16)
    whole, parts = probe.readings(x), probe.readings(x, batch=3)
    torch.testing.assert_close(whole[0], probe(x)[0] * torch.linspace(0.5, 9, 10) + torch.arange(10.0))
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b)


def test_a_trained_probe_is_kept_and_knows_the_scale_of_each_factor(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.os, "cpu_count", lambda: 1)  # no processes for four clips
    probe = evaluate.train_probe(16, tmp_path, CPU, people=4, steps=3, batch=6)
    truth = np.load(tmp_path / "probe_toys16" / "truth.npy")
    torch.testing.assert_close(probe.mean, torch.from_numpy(truth.mean(0)))
    torch.testing.assert_close(probe.std, torch.from_numpy(truth.std(0, ddof=1)))
    monkeypatch.setattr(evaluate, "make_pack", None)  # the second time nothing is drawn or trained
    again = evaluate.train_probe(16, tmp_path, CPU)
    assert not again.training
    x = torch.randn(2, 3, 16, 16)
    for a, b in zip(probe.readings(x), again.readings(x)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("damage", ["no checkpoint", "another network", "nothing in it"])
def test_a_kept_probe_that_is_damaged_is_trained_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(evaluate.os, "cpu_count", lambda: 1)
    few = dict(people=4, steps=2, batch=6)
    evaluate.train_probe(16, tmp_path, CPU, **few)
    kept = tmp_path / f"probe16_world{toyfaces.WORLD}.pt"
    networks = {"another network": dict(probe=torch.nn.Linear(2, 3).state_dict()), "nothing in it": {}}
    if damage in networks:
        save_checkpoint(kept, dict(kind="probe", format=1, networks=networks[damage]))
    else:
        kept.write_bytes(kept.read_bytes()[:999])
    evaluate.train_probe(16, tmp_path, CPU, **few)
    monkeypatch.setattr(evaluate, "make_pack", None)  # what was trained anew is kept, and whole
    evaluate.train_probe(16, tmp_path, CPU)


# ------------------------------------------------------------------------------------------------------------
# the control table and the matrix of changes, where the right answer is known


class World:
    """Pack, probe and drawing hand in one, that never errs: all that is drawn is remembered, and looked up.

    Every factor of person c is a cosine of c + 1 turns a clip: two people have nothing in common, so what is
    0 in theory is 0 here.
    """

    size, people, T = 32, 7, 50

    def __init__(self):
        reach = 14, 10, 9, 0.3, 0.8, 0.7, 0.9, 0.4, 0.4, 0.45  # in the order of FACTORS
        middle = 0, 0, 0, 0.35, 0, 0, 0, 0.2, 0.5, 0.5
        c, t, j = np.ogrid[: self.people, : self.T, :10]
        curves = np.cos(2 * np.pi * (c + 1) * t / self.T + 0.5 * j)
        self.truth = (curves * reach + middle).astype(np.float32)  # (people, T, 10)
        self.known, self.drawn = {}, {}
        self.n_frames = [self.T] * self.people
        sounds = [mel_windows(log_mel(self.sound(c)), [5])[0] for c in range(self.people)]
        self.sixth_window = np.stack(sounds)  # (people, 1, 80, 16): tells whose sound it is

    def draw(self, who, state, size):
        """toyfaces.draw that remembers"""
        key = (who.seed, *state.values())
        if key not in self.drawn:
            picture = self.drawn[key] = toyfaces.draw(who, state, size).copy()
            self.known[picture.tobytes()] = who.seed - TEST, np.array([state[k] for k in FACTORS])
        return self.drawn[key]

    def states(self, picture):
        """(.., H, W, 3) in [-1, 1] as tensors are -> who, state (10,)"""
        return self.known[to_uint8(picture).tobytes()]

    # as a pack
    def __len__(self):
        return self.people

    def frame(self, c, k):
        return self.draw(person(TEST + c), dict(zip(FACTORS, map(float, self.truth[c, k]))), self.size)

    def frames(self, c, ks):
        return np.stack([self.frame(c, k) for k in ks])

    def sound(self, c):
        return np.random.default_rng(c).uniform(-0.5, 0.5, 640 * self.T).astype(np.float32)

    # as a probe
    def readings(self, pictures):
        who, state = zip(*map(self.states, pictures))
        return torch.tensor(np.stack(state)), torch.eye(64)[list(who)]


class Network:
    """Stands in for the network under test, with control that is known: perfect, or short of one input."""

    def __init__(self, world, ignores=()):
        self.world, self.ignores = world, ignores
        self.config = SimpleNamespace(size=world.size, template="toy")

    def animate(self, source, mel, driving=None):
        world = self.world
        face, rest = world.states(source)
        state = np.stack([world.states(frame)[1] for frame in driving])
        heard = np.square(world.sixth_window - mel[5].numpy()).sum((1, 2, 3)).argmin()
        if "driving" in self.ignores:
            state[:] = rest
        if "sound" not in self.ignores:
            state[:, LIPS] = world.truth[heard, : len(mel), LIPS].T
        who = person(TEST + (0 if "face" in self.ignores else face))
        frames = np.stack([world.draw(who, dict(zip(FACTORS, map(float, s))), world.size) for s in state])
        yield from to_tensor(frames).split(16)


@pytest.fixture(scope="module")
def world():
    return World()


def table_of(world, *ignores):
    return control_table(talker(Network(world, ignores), CPU), world, world, world.truth, CPU)


HEAD = ("yaw", "pitch", "roll", "blink", "gaze")


def test_perfect_control_is_one_everywhere_and_leaks_nothing(world):
    table = table_of(world)
    for name in ("open", "wide", *HEAD, "identity", "open range"):
        assert table[name] == pytest.approx(1, abs=0.01), name
    for name in ("wrong sound", "driving mouth"):
        assert table[name] == pytest.approx(0, abs=0.01), name


def test_a_still_photo_follows_nothing_and_keeps_its_identity(world):
    table = table_of(world, "sound", "driving")
    for name in ("open", "wide", "wrong sound", "driving mouth", *HEAD):
        assert table[name] == pytest.approx(0, abs=0.01), name
    assert table["identity"] == 1


def test_a_network_that_ignores_everything_finds_one_person_of_seven_by_chance(world):
    assert table_of(world, "face")["identity"] == pytest.approx(1 / 7)
    assert table_of(world, "sound", "driving", "face")["open"] == pytest.approx(0, abs=0.01)


def test_lips_that_copy_the_driving_mouth_are_found_out(world):
    table = table_of(world, "sound")
    assert table["driving mouth"] == pytest.approx(1, abs=0.01)
    assert abs(table["open"]) < 0.01 and abs(table["wide"]) < 0.01
    assert all(table[name] == pytest.approx(1, abs=0.01) for name in HEAD)


def test_a_head_that_ignores_the_driving_clip_is_found_out(world):
    table = table_of(world, "driving")
    assert all(abs(table[name]) < 0.01 for name in HEAD) and table["open"] == pytest.approx(1, abs=0.01)


def test_the_probes_own_row_is_perfect_when_the_probe_is(world):
    row = probe_row(world, world, world.truth, CPU)
    for name in (*(k for k in READ if "gaze" not in k), "gaze", "identity", "open range"):
        assert row[name] == pytest.approx(1, abs=0.01), name
    assert row["wrong sound"] == pytest.approx(0, abs=0.01)
    assert row.keys() == table_of(world).keys()  # they stand in one table


def test_a_probe_that_confuses_two_factors_does_not_look_perfect(world):
    crossed = SimpleNamespace(readings=lambda x: (world.readings(x)[0].flip(1), world.readings(x)[1]))
    row = probe_row(crossed, world, world.truth, CPU)
    assert all(row[name] < 0.95 for name in HEAD) and row["identity"] == 1


# input -> the one thing that it moves
MOVES = dict(face="identity", sound="lips", pose="pose", eyes="eyes", mouth=None)


@pytest.mark.parametrize(
    "ignores, moves", [((), {}), (("sound",), dict(sound=None, mouth="lips")), (("face",), dict(face=None))]
)
def test_the_matrix_is_one_where_an_input_should_move_something_and_nought_elsewhere(
    world, monkeypatch, ignores, moves
):
    monkeypatch.setattr(evaluate, "draw", world.draw)
    matrix = change_matrix(talker(Network(world, ignores), CPU), world, world, world.truth, CPU, trials=1, T=world.T)
    for name, moved in {**MOVES, **moves}.items():
        for column, value in matrix[name].items():
            assert value == pytest.approx(float(column == moved), abs=0.02), (name, column)


def test_the_toy_report_prints_both_tables_and_writes_the_numbers(world, tmp_path, monkeypatch, capsys):
    def make_pack(folder, size, people, seconds, first, workers):
        folder.mkdir()
        np.save(folder / "truth.npy", world.truth.reshape(-1, 10))

    networks = dict(good=Network(world), deaf=Network(world, ("sound",)))
    stand_ins = dict(
        load_model=lambda path, device: networks[path],
        train_probe=lambda size, folder, device: world,
        draw=world.draw,
        make_pack=make_pack,
        Pack=lambda folder: world,
        change_matrix=functools.partial(change_matrix, trials=1),
    )
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(evaluate, name, stand_in)
    numbers = tmp_path / "numbers.json"
    places = ["--cache", str(tmp_path / "new" / "cache"), "--json", str(numbers)]
    evaluate.main(["--toy", "good", "deaf", "--people", "7", "--device", "cpu", *places])
    report = json.loads(numbers.read_text())
    assert report["good"]["open"] > 0.99 and abs(report["deaf"]["open"]) < 0.01
    assert report["good matrix"]["sound"]["lips"] > 0.98 and report["deaf matrix"]["sound"]["lips"] < 0.02
    out = capsys.readouterr().out
    lines = [cells(line) for line in out.splitlines() if line.startswith("|")]
    columns = lines[0]
    good, deaf = (dict(zip(columns, line)) for line in lines if line[0] in networks)
    assert good["open"] == good["yaw"] == good["identity"] == "1.00" and deaf["driving mouth"] == "1.00"
    assert "deaf: change one input" in out


# ------------------------------------------------------------------------------------------------------------
# the script


def cells(line):
    """| a | b | -> ["a", "b"]"""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def film(path, frames):
    with VideoWriter(path, *frames.shape[1:3]) as video:
        for frame in frames:
            video.write(frame)
    return str(path)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A clip of 7 frames of 24x32 pixels, the same a little brighter, and one of another size"""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    frames = rng.integers(40, 190, (7, 4, 3, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)  # (T, 32, 24, 3)
    return (
        film(folder / "real.mp4", frames),
        film(folder / "fake.mp4", frames + 20),
        film(folder / "wide.mp4", frames.swapaxes(1, 2)),
    )


def printed(capsys):
    """The last table printed -> {column: cell} of its only row"""
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    ]
    return dict(zip(lines[0], lines[-1]))


def test_two_clips_are_compared_frame_by_frame(clips, capsys):
    real, fake, _ = clips
    evaluate.main([real, fake])
    row = printed(capsys)
    pairs = list(zip(read_video(real), read_video(fake)))
    assert float(row["frames"]) == len(pairs) == 7 and row[""] == "fake.mp4"
    wang = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1)
    assert float(row["SSIM"]) == pytest.approx(
        np.mean([skimage.metrics.structural_similarity(a, b, **wang) for a, b in pairs]), abs=0.006
    )
    assert float(row["PSNR"]) == pytest.approx(
        np.mean([skimage.metrics.peak_signal_noise_ratio(a, b) for a, b in pairs]), abs=0.006
    )
    assert float(row["L1"]) == pytest.approx(20 / 255, abs=0.015)  # the codec rounds


def test_a_clip_is_equal_to_itself(clips, capsys):
    evaluate.main([clips[0], clips[0]])
    row = printed(capsys)
    assert float(row["L1"]) == 0 and float(row["SSIM"]) == 1 and row["PSNR"] == "inf"


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        run(lambda: evaluate.main([str(a) for a in argv]))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and "Traceback" not in err and out == ""
    return err


def test_what_the_user_got_wrong_is_one_line_and_status_two(clips, tmp_path, capsys, monkeypatch):
    real, _, wide = clips
    text = tmp_path / "notes.txt"
    text.write_text("no clip, no weights")
    tiny = film(tmp_path / "tiny.mp4", np.zeros((2, 8, 8, 3), np.uint8))
    assert "two clips" in refused(capsys)
    assert "two clips" in refused(capsys, real)
    assert "nowhere.mp4" in refused(capsys, real, tmp_path / "nowhere.mp4")
    assert "notes.txt" in refused(capsys, text, real)
    error = refused(capsys, real, wide)
    assert "wide.mp4" in error and "32x24" in error and "24x32" in error
    assert "8x8" in refused(capsys, tiny, tiny)  # no room for the window of SSIM
    cache = ("--cache", tmp_path / "cache")
    assert "nowhere.pt" in refused(capsys, "--toy", tmp_path / "nowhere.pt", *cache)
    assert "notes.txt" in refused(capsys, "--toy", text, *cache)
    assert "--people 5" in refused(
        capsys, "--toy", text, "--people", 5, *cache
    )  # A, B, C and the strangers must differ
    assert "nonsense" in refused(capsys, "--toy", text, "--device", "nonsense", *cache)
    assert "nowhere" in refused(capsys, "--toy", text, "--json", tmp_path / "nowhere" / "a.json", *cache)
    model = SimpleNamespace(config=SimpleNamespace(size=32, template="face"))
    monkeypatch.setattr(evaluate, "load_model", lambda path, device: model)
    assert "real faces" in refused(capsys, "--toy", "some.pt", *cache)
    model.config.template = "toy"
    assert "notes.txt" in refused(capsys, "--toy", "some.pt", "--cache", text / "cache")
