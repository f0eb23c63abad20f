"""The control table, on networks whose control is known, and the probe."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import control
import evaluate
import toyfaces
from audio import log_mel, mel_windows
from control import (
    Probe, ToyTest, change_matrix, control_table, correlation, load_network, animator, markdown_table, probe_row,
    retrieval)
from media import to_tensor, to_uint8
from toyfaces import FACTORS, TEST_SEED, make_person

LIPS = [FACTORS.index("open"), FACTORS.index("wide")]
CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parent.parent


def test_correlation_is_pearsons_over_all_axes_and_zero_for_a_constant_curve():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 41))
    b = 0.4 * a + rng.normal(2, 1, a.shape)
    da, db = a - a.mean(), b - b.mean()
    assert correlation(a, b) == pytest.approx((da * db).sum() / np.sqrt((da**2).sum() * (db**2).sum()), abs=1e-12)
    t = np.linspace(0, 3, 17)
    assert correlation(t, 5 * t - 2) == pytest.approx(1) and correlation(t, 4 - 0.1 * t) == pytest.approx(-1)
    assert correlation(t, np.full(17, 0.1)) == 0 and correlation(np.full(17, 0.1), t) == 0


def test_retrieval_is_the_share_of_queries_whose_nearest_neighbour_is_their_own_row():
    gallery = torch.eye(4, 6)
    assert retrieval(gallery, gallery) == 1
    assert retrieval(gallery[[1, 0, 2, 3]], gallery) == 0.5
    assert retrieval(gallery.roll(1, 0), gallery) == 0
    near = gallery + 0.3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert retrieval(near[:3], gallery[:3]) == sum(int(near[k, :3].argmax()) == k for k in range(3)) / 3


def test_a_markdown_table_has_one_line_a_row_and_two_decimals():
    table = markdown_table({"real": dict(open=0.987, yaw=1), "out/a.pt": dict(yaw=-0.004, open=0.5)})
    assert table.splitlines() == [
        "| | open | yaw |",
        "|---|---|---|",
        "| real | 0.99 | 1.00 |",
        "| out/a.pt | 0.50 | -0.00 |",
    ]


# ------------------------------------------------------------------------------------------------------------
# the probe


@pytest.mark.parametrize("size", [16, 48])
def test_the_probe_gives_ten_factors_and_a_unit_embedding_for_each_image_independently(size):
    torch.manual_seed(0)
    probe = Probe(size, width=8).eval()
    x = torch.randn(5, 3, size, size)
    factors, embeddings = probe(x)
    assert factors.shape == (5, 10) and embeddings.shape == (5, 64)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5))
    changed = x.clone()
    changed[3] += 1
    same = torch.tensor([0, 1, 2, 4])
    for before, after in zip((factors, embeddings), probe(changed)):
        torch.testing.assert_close(before[same], after[same])
        assert not torch.allclose(before[3], after[3])


def test_measured_factors_have_their_own_units_and_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    probe = Probe(16, width=8).eval()
    probe.mean.copy_(torch.arange(10.0))
    probe.std.copy_(torch.linspace(0.5, 9, 10))
    x = torch.randn(7, 3, 16, 16)
    whole, parts = probe.measure(x), probe.measure(x, batch=3)
    torch.testing.assert_close(whole[0], probe(x)[0] * torch.linspace(0.5, 9, 10) + torch.arange(10.0))
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b)


def test_a_trained_probe_is_saved_with_the_scale_of_each_factor(tmp_path, monkeypatch):
    probe = control.train_probe(16, tmp_path, CPU, people=4, steps=3, batch=6)
    truth = np.load(tmp_path / "probe_toys16" / "truth.npy")
    torch.testing.assert_close(probe.mean, torch.from_numpy(truth.mean(0)))
    torch.testing.assert_close(probe.std, torch.from_numpy(truth.std(0, ddof=1)))
    monkeypatch.setattr(control, "make_pack", None)  # the second time nothing is drawn or trained
    again = control.train_probe(16, tmp_path, CPU)
    assert not again.training
    x = torch.randn(2, 3, 16, 16)
    for a, b in zip(probe.measure(x), again.measure(x)):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------
# the control table and the matrix of changes, where the right answer is known


class World:
    """Stands in for the pack, the probe and toyfaces.draw. The probe has no error, as every drawn image is stored.

    Every factor of person c is a cosine with c + 1 periods in a clip. Two people are uncorrelated, so values that are 0
    in theory are exactly 0 here.
    """

    size, people, T = 32, 7, 25

    def __init__(self):
        reach = 14, 10, 9, 0.3, 0.8, 0.7, 0.9, 0.4, 0.4, 0.45  # in the order of FACTORS
        middle = 0, 0, 0, 0.35, 0, 0, 0, 0.2, 0.5, 0.5
        c, t, j = np.ogrid[: self.people, : self.T, :10]
        curves = np.cos(2 * np.pi * (c + 1) * t / self.T + 0.5 * j)
        self.truth = (curves * reach + middle).astype(np.float32)  # (people, T, 10)
        self.states_of, self.drawn = {}, {}
        self.n_frames = [self.T] * self.people
        sounds = [mel_windows(log_mel(self.sound(c)), [5])[0] for c in range(self.people)]
        self.sixth_window = np.stack(sounds)  # (people, 1, 80, 16): identifies the sound

    def draw(self, who, state, size):
        """toyfaces.draw, with the result stored"""
        key = (who.seed, *state.values())
        if key not in self.drawn:
            picture = self.drawn[key] = toyfaces.draw(who, state, size).copy()
            self.states_of[picture.tobytes()] = who.seed - TEST_SEED, np.array([state[k] for k in FACTORS])
        return self.drawn[key]

    def state_of(self, picture):
        """Image (3, H, W) in [-1, 1] -> person, state (10,)"""
        return self.states_of[to_uint8(picture).tobytes()]

    # as a pack
    def __len__(self):
        return self.people

    def frame(self, c, k):
        return self.draw(make_person(TEST_SEED + c), dict(zip(FACTORS, map(float, self.truth[c, k]))), self.size)

    def frames(self, c, ks):
        return np.stack([self.frame(c, k) for k in ks])

    def sound(self, c):
        return np.random.default_rng(c).uniform(-0.5, 0.5, 640 * self.T).astype(np.float32)

    # as a probe
    def measure(self, pictures):
        people, states = zip(*map(self.state_of, pictures))
        return torch.tensor(np.stack(states)), torch.eye(64)[list(people)]


class Network:
    """Stands in for the network under test: perfect control, except that it ignores some inputs."""

    def __init__(self, world, ignores=()):
        self.world, self.ignores = world, ignores
        self.config = SimpleNamespace(size=world.size, template="toy")
        self.kind = "weights"

    def animate(self, source, mel, driving=None):
        world = self.world
        face, photo_state = world.state_of(source)
        states = np.stack([world.state_of(frame)[1] for frame in driving])
        speaker = np.square(world.sixth_window - mel[5].numpy()).sum((1, 2, 3)).argmin()
        if "driving" in self.ignores:
            states[:] = photo_state
        if "sound" not in self.ignores:
            states[:, LIPS] = world.truth[speaker, : len(mel), LIPS].T
        who = make_person(TEST_SEED + (0 if "face" in self.ignores else face))
        frames = np.stack([world.draw(who, dict(zip(FACTORS, map(float, s))), world.size) for s in states])
        yield from to_tensor(frames).split(16)


@pytest.fixture(scope="module")
def world():
    return World()


def toy_test_of(world, probe=None):
    return ToyTest(probe or world, world, world.truth, CPU)


def table_of(world, *ignores):
    return control_table(animator(Network(world, ignores), CPU), toy_test_of(world))


READ = ("open", "wide", "yaw", "pitch", "roll", "blink")
HEAD = ("yaw", "pitch", "roll", "blink", "gaze")


def test_perfect_control_is_one_and_the_unrelated_columns_are_zero(world):
    table = table_of(world)
    for name in ("open", "wide", *HEAD, "identity", "open range"):
        assert table[name] == pytest.approx(1, abs=0.01), name
    for name in ("wrong sound", "driving mouth"):
        assert table[name] == pytest.approx(0, abs=0.01), name


def test_a_still_photo_has_zero_correlations_and_perfect_identity(world):
    table = table_of(world, "sound", "driving")
    for name in ("open", "wide", "wrong sound", "driving mouth", *HEAD):
        assert table[name] == pytest.approx(0, abs=0.01), name
    assert table["identity"] == 1


def test_a_network_that_ignores_everything_finds_one_person_of_seven_by_chance(world):
    assert table_of(world, "face")["identity"] == pytest.approx(1 / 7)
    assert table_of(world, "sound", "driving", "face")["open"] == pytest.approx(0, abs=0.01)


def test_lips_copied_from_the_driving_clip_appear_in_the_column_driving_mouth(world):
    table = table_of(world, "sound")
    assert table["driving mouth"] == pytest.approx(1, abs=0.01)
    assert abs(table["open"]) < 0.01 and abs(table["wide"]) < 0.01
    assert all(table[name] == pytest.approx(1, abs=0.01) for name in HEAD)


def test_a_head_that_ignores_the_driving_clip_has_zero_correlations(world):
    table = table_of(world, "driving")
    assert all(abs(table[name]) < 0.01 for name in HEAD) and table["open"] == pytest.approx(1, abs=0.01)


def test_the_row_of_a_perfect_probe_is_perfect(world):
    row = probe_row(toy_test_of(world))
    for name in (*READ, "gaze", "identity", "open range"):
        assert row[name] == pytest.approx(1, abs=0.01), name
    assert row["wrong sound"] == pytest.approx(0, abs=0.01)
    assert row.keys() == table_of(world).keys()  # both are rows of one table


def test_a_probe_that_confuses_two_factors_does_not_look_perfect(world):
    crossed = SimpleNamespace(measure=lambda x: (world.measure(x)[0].flip(1), world.measure(x)[1]))
    row = probe_row(toy_test_of(world, crossed))
    assert all(row[name] < 0.95 for name in HEAD) and row["identity"] == 1


# input -> the only column that it should move
MOVES = dict(face="identity", sound="lips", pose="pose", eyes="eyes", mouth=None)


@pytest.mark.parametrize("ignores, moves", [
    ((), {}), (("sound",), dict(sound=None, mouth="lips")), (("face",), dict(face=None))])
def test_the_matrix_is_one_where_an_input_should_move_something_and_zero_elsewhere(world, monkeypatch, ignores, moves):
    monkeypatch.setattr(control, "draw", world.draw)
    matrix = change_matrix(animator(Network(world, ignores), CPU), toy_test_of(world), trials=1, T=world.T)
    for name, moved in {**MOVES, **moves}.items():
        for column, value in matrix[name].items():
            assert value == pytest.approx(float(column == moved), abs=0.02), (name, column)


def test_the_matrix_of_fewer_people_than_trials_uses_each_person_once(world, monkeypatch):
    monkeypatch.setattr(control, "draw", world.draw)
    matrix = change_matrix(animator(Network(world), CPU), toy_test_of(world), trials=8, T=world.T)
    assert all(np.isfinite(value) for row in matrix.values() for value in row.values())


@pytest.fixture
def toy_world(world, monkeypatch):
    """Stand-ins for the toy world on disk, the probe, and the networks "good" and "deaf" (ignores the sound)"""
    def make_pack(folder, size, people, seconds, first):
        folder.mkdir()
        np.save(folder / "truth.npy", world.truth.reshape(-1, 10))

    networks = dict(good=Network(world), deaf=Network(world, ("sound",)))
    stand_ins = dict(
        load_network=lambda path, device: networks[path],
        train_probe=lambda size, folder, device: world,
        draw=world.draw,
        make_pack=make_pack,
        Pack=lambda folder: world,
        change_matrix=functools.partial(change_matrix, trials=1),
    )
    monkeypatch.setattr(control, "TEST_PEOPLE", world.people)
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(control, name, stand_in)
    return networks


def test_the_toy_report_prints_both_tables_and_writes_the_numbers(toy_world, tmp_path, monkeypatch, capsys):
    numbers = tmp_path / "numbers.json"
    monkeypatch.setattr(control, "CACHE", tmp_path / "new" / "cache")
    evaluate.main(["toy", "good", "deaf", "--device", "cpu", "--json", str(numbers)])
    report = json.loads(numbers.read_text())
    assert report["good"]["open"] > 0.99 and abs(report["deaf"]["open"]) < 0.01
    assert report["good matrix"]["sound"]["lips"] > 0.98 and report["deaf matrix"]["sound"]["lips"] < 0.02
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    columns = next(line for line in lines if "open" in line)
    good, deaf = (dict(zip(columns, line)) for line in lines if line[0] in toy_world)
    assert good["open"] == good["yaw"] == good["identity"] == "1.00" and deaf["driving mouth"] == "1.00"
    assert "deaf: change one input" in out


def test_user_errors_are_one_line_with_status_2(toy_world, tmp_path, refused, monkeypatch):
    fails = functools.partial(refused, evaluate.main, "toy")
    text = tmp_path / "notes.txt"
    text.write_text("not weights")
    with monkeypatch.context() as patch:
        patch.setattr(control, "load_network", load_network)
        assert "nowhere.pt" in fails(tmp_path / "nowhere.pt")
        assert "notes.txt" in fails(text)
        assert "face.pt: a network of real faces" in fails(ROOT / "weights" / "face.pt")
    assert "nonsense" in fails("good", "--device", "nonsense")
    assert "nowhere" in fails("good", "--json", tmp_path / "nowhere" / "a.json")
    monkeypatch.setattr(control, "probe_row", None)  # nothing is measured
    monkeypatch.setattr(control, "CACHE", text / "cache")
    assert "notes.txt" in fails("good")


def test_pc_avs_can_be_measured_by_the_same_table():
    model = load_network(ROOT / "weights" / "pcavs_toy.pt", "cpu")
    frames, wav, _ = toyfaces.make_toy_clip(3, 0.28, 32)
    clip = animator(model, "cpu")(frames[0], wav, frames)
    assert clip.shape == (7, 3, 32, 32) and clip.dtype == torch.float32 and (clip - to_tensor(frames)).abs().mean() < 0.2
