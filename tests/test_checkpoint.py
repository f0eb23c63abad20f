"""Weights files are saved completely or not at all, checked when read, and downloaded by their hash."""

import argparse
import contextlib
import errno
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import checkpoint
import judges
import vision
from checkpoint import iterate_nested, load_checkpoint, save_checkpoint
from fusion import FCTFG, Config, load_model, load_published
from media import InputError
from stylegan2 import Discriminator, Generator, load_rosinality
from syncnet import SyncNet, load_sync

# ------------------------------------------------------------------------------------------------------------
# checkpoints


def toy_checkpoint(step=3):
    return dict(
        kind="stage1",
        format=1,
        step=step,
        config=dict(size=32, name="ö"),
        networks=dict(w=torch.arange(6.0).view(2, 3)),
    )


def test_a_checkpoint_is_read_as_it_was_saved_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "a.pt"
    for step in (3, 4):
        save_checkpoint(path, toy_checkpoint(step))
        loaded = load_checkpoint(path, ("stage1", "weights"))
        assert loaded["step"] == step and loaded["config"] == dict(size=32, name="ö")
        assert torch.equal(loaded["networks"]["w"], torch.arange(6.0).view(2, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def file_with(tmp_path, defect):
    path = tmp_path / "a.pt"
    save_checkpoint(path, toy_checkpoint())
    if defect == "missing":
        path.unlink()
    elif defect == "directory":
        path = tmp_path
    elif defect == "empty":
        path.write_bytes(b"")
    elif defect.startswith("truncated"):
        os.truncate(path, path.stat().st_size * int(defect.split()[1]) // 100)
    elif defect == "damaged":
        content = bytearray(path.read_bytes())
        content[60:90] = bytes(30)
        path.write_bytes(content)
    elif defect == "text":
        path.write_text("<html>404 not found</html>")
    elif defect == "hostile":
        torch.save(dict(kind="stage1", format=1, step=Hostile()), path)
    elif defect == "hostile pickle":
        path.write_bytes(pickle.dumps(Hostile()))
    elif defect == "a network":
        torch.save(torch.nn.Linear(2, 3), path)
    elif defect == "state_dict":
        torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    elif defect == "list":
        torch.save([1, 2], path)
    elif defect == "tensor kind":
        torch.save(dict(kind=torch.zeros(3), format=1), path)
    elif defect == "other kind":
        save_checkpoint(path, dict(kind="weights", format=1))
    elif defect == "other format":
        torch.save(dict(kind="stage1", format=2), path)
    return path


REFUSED = {
    "missing": "no such file",
    "directory": "is a directory",
    "empty": "empty",
    **{f"truncated {share}": "damaged, cut short" for share in (1, 30, 70, 99)},
    "damaged": "damaged, cut short",
    "text": "damaged, cut short",
    "hostile": "holds more than tensors",
    "hostile pickle": "holds more than tensors|damaged, cut short",
    "a network": "holds more than tensors",
    "state_dict": "was not written by this package",
    "list": "holds a list",
    "tensor kind": "was not written by this package",
    "other kind": "is a 'weights' checkpoint; expected a 'stage1 or stage2' checkpoint",
    "other format": "has format 2",
}


@pytest.mark.parametrize("defect", REFUSED)
def test_a_file_that_is_not_the_expected_checkpoint_is_refused_in_one_line(tmp_path, defect, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = file_with(tmp_path, defect)
    with pytest.raises(InputError, match=REFUSED[defect]) as caught:
        load_checkpoint(path, ("stage1", "stage2"))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


def test_a_save_that_fails_keeps_the_old_file_and_leaves_no_draft(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, toy_checkpoint(1))

    def full(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"a\.pt: cannot be written \(No space left on device\)"):
        save_checkpoint(path, toy_checkpoint(2))
    assert load_checkpoint(path, "stage1")["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_torchs_error_for_a_full_disk_becomes_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    big = toy_checkpoint() | dict(networks=dict(w=torch.zeros(300_000)))
    with pytest.raises(InputError, match=r"a\.pt: cannot be written"):
        save_checkpoint(tmp_path / "a.pt", big)
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_saved_to_is_one_line(tmp_path):
    with pytest.raises(InputError, match="No such file or directory"):
        save_checkpoint(tmp_path / "none" / "a.pt", toy_checkpoint())
    (tmp_path / "b.pt").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        save_checkpoint(tmp_path / "b.pt", toy_checkpoint())


def test_old_drafts_of_killed_runs_are_deleted(tmp_path):
    old, young = tmp_path / ".a.pt-x", tmp_path / ".a.pt-y"
    for draft in (old, young):
        draft.write_bytes(b"draft")
    os.utime(old, (time.time() - 2 * checkpoint.STALE_SECONDS,) * 2)
    save_checkpoint(tmp_path / "a.pt", toy_checkpoint())
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.pt-y", "a.pt"]


def save_without_end(path, saving):
    torch.set_num_threads(1)  # a fork has no threads of its parent
    for step in range(10**6):
        networks = dict(w=torch.full((50_000,), float(step)))
        save_checkpoint(path, dict(kind="stage1", format=1, step=step, networks=networks))
        if step == 0:
            os.write(saving, b"saving")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are Unix's")
def test_a_run_killed_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    """Ten SIGKILLs of forks, which start at once."""
    rng, path = random.Random(0), tmp_path / "a.pt"
    ready, saving = os.pipe()
    for _ in range(10):
        child = os.fork()
        if not child:
            try:
                save_without_end(path, saving)
            finally:
                os._exit(1)
        os.read(ready, 6)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        saved = load_checkpoint(path, "stage1")
        assert (saved["networks"]["w"] == saved["step"]).all() and len(saved["networks"]["w"]) == 50_000


def test_a_file_without_the_experts_weights_is_refused(tmp_path):
    torch.save({"netG": {}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="state_dict"):
        judges.wav2lip_expert("cpu", tmp_path / "other.pth")


# ------------------------------------------------------------------------------------------------------------
# every reader refuses files with one error


def plain(network):
    return dict(network.state_dict())


NARROW = dict(dim=24, n_mlp=2, base=256, cap=32)
LAYERS = [(32, 32), (32, 32), (16, 32)]


def valid_file(name):
    """Content of a small valid file and the function that reads it."""
    torch.manual_seed(0)
    if name == "stylegan2":
        G, D = Generator(16, **NARROW), Discriminator(16, base=256, cap=32)
        return dict(g_ema=plain(G), d=plain(D), latent_avg=torch.ones(24)), lambda path: load_rosinality(path, 16)
    if name in ("psp", "trunk"):
        state = plain(vision.GradualStyleEncoder(6, dim=24, width=16))
        if name == "trunk":
            trunk = {k: v for k, v in state.items() if k.startswith(("input_layer.", "body."))}
            return trunk | {"output_layer.3.weight": torch.ones(9, 9)}, lambda path: vision.load_encoder(path, 6)
        del state["latent_avg"]
        state = {f"encoder.{k}": v for k, v in state.items()}
        content = dict(state_dict=state, latent_avg=torch.ones(6, 24), opts={})
        return content, lambda path: load_published(16, encoder=path)
    if name == "hyperstyle":
        state = plain(vision.HyperStyleNet(LAYERS, "shared", width=4))
        content = dict(state_dict={f"hypernet.{k}": v for k, v in state.items()})
        return content, lambda path: vision.load_hypernet(path, LAYERS)
    if name == "weights":
        options = dict(encoder_width=8, linear=20, map_code=12, map_channels=(8, 6), pose_dim=5, hyper="none")
        model = FCTFG(Config.at(16, **NARROW, **options))
        return dict(kind=name, format=1, config=vars(model.config), networks=dict(model=plain(model))), load_model
    if name == "sync":
        net = dict(size=16, dim=32, width=0.125)
        state, config = plain(SyncNet(**net)), dict(net=net, template="toy")
        content = dict(kind="syncnet", format=1, config=config, networks=dict(expert=state))
        return content, lambda path: load_sync(path, "cpu")
    # complete files of these networks have 80 MB and more
    incomplete = {"features.0.weight": torch.ones(64, 3, 3, 3), "fc.bias": torch.ones(4)}
    if name == "wav2lip":
        return dict(state_dict=incomplete), lambda path: judges.wav2lip_expert("cpu", path)
    if name == "vgg":
        return incomplete | {"classifier.0.bias": torch.ones(2)}, lambda path: judges.vgg19("cpu", path)
    return incomplete, lambda path: judges.lpips("cpu", path, path)


REPLACEMENTS = dict(  # of a valid tensor; a few bytes in a file can take terabytes in memory
    sparse=lambda v: v.to_sparse(), meta=lambda v: v.to("meta"), scalar=lambda v: torch.tensor(1.0),
    repeated=lambda v: torch.zeros(1).expand(*v.shape[:-1], 1 << 40), hollow=lambda v: torch.ones(1 << 40, 0),
    longer=lambda v: torch.ones(*v.shape[:-1], v.shape[-1] + 1),
    quantised=lambda v: torch.quantize_per_tensor(v.float(), 1.0, 0, torch.quint8),
    nested=lambda v: torch.nested.nested_tensor([v, v]), nothing=lambda v: None, text=lambda v: "a\nb",
    rows=lambda v: [v])
DEFECTS = [*REPLACEMENTS, "absent", "numbered", "surplus"]
WRONG_SIZES = (-1, 1 << 40, 10 ** 400, math.nan, "many", None, torch.ones(2), [1])


def copy_dicts(content):
    return {k: copy_dicts(v) if isinstance(v, dict) else v for k, v in content.items()}


def with_defect(content, defect, rng):
    """A copy of the content with one wrong tensor."""
    copy = copy_dicts(content)
    dicts = [d for d in iterate_nested(copy) if isinstance(d, dict)]
    states = [d for d in dicts if sum(isinstance(v, torch.Tensor) for v in d.values()) > 1]
    state = rng.choice(states)
    key = rng.choice([k for k, v in state.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim])
    if defect == "surplus":
        state[rng.choice([7, "a\nb", "body.99", ("x", 1), ""])] = torch.ones(2)
    else:
        value = state.pop(key)
        if defect != "absent":
            state[7 if defect == "numbered" else key] = value if defect == "numbered" else REPLACEMENTS[defect](value)
    return copy


def with_wrong_size(content, k):
    """A copy with the k-th wrong size in its config; None if it has no config."""
    copy = copy_dicts(content)
    dicts = [d for d in iterate_nested(copy) if isinstance(d, dict)]
    sizes = [(d, key) for d in dicts for key in d if key in ("size", "dim", "n_mlp", "base")]
    if sizes:
        config, key = sizes[k % len(sizes)]
        config[key] = WRONG_SIZES[k]
        return copy


# load_strictly reads all of them, so files of large networks are tested with a third of the errors each
READERS = dict(stylegan2=DEFECTS, weights=DEFECTS, sync=DEFECTS,
               psp=DEFECTS[::3], trunk=DEFECTS[1::3], hyperstyle=DEFECTS[2::3],
               vgg=DEFECTS[::3], lpips=DEFECTS[1::3], wav2lip=DEFECTS[2::3])


@pytest.mark.filterwarnings("ignore:.*(quantize|nested)")
@pytest.mark.parametrize("name", READERS)
def test_files_with_one_error_are_refused_in_one_line(name, tmp_path):
    (content, reader), rng, path = valid_file(name), random.Random(name), tmp_path / "odd.pt"
    torch.save(content, path)
    valid = path.read_bytes()
    if name not in ("vgg", "lpips", "wav2lip"):
        reader(path)
    files = {defect: with_defect(content, defect, rng) for defect in READERS[name]}
    files |= {f"size {k}": odd for k in range(len(WRONG_SIZES)) if (odd := with_wrong_size(content, k))}
    for defect, odd in files.items():
        torch.save(odd, path)
        with pytest.raises(InputError) as caught:
            reader(path)
            pytest.fail(f"{defect}: accepted")
        assert "odd.pt" in str(caught.value) and "\n" not in str(caught.value), defect
    for turn in range(4):  # a wrong byte may lie where it does not matter
        at = rng.randrange(len(valid))
        path.write_bytes(valid[:at] if turn % 2 else valid[:at] + bytes([valid[at] ^ 255]) + valid[at + 1:])
        with contextlib.suppress(InputError):
            reader(path)
    assert turn == 3


# ------------------------------------------------------------------------------------------------------------
# downloads from a local server


CONTENT = bytes(range(256)) * 500  # 128,000 bytes


class Server:
    """Answers each path by its function in `routes` and records the requested paths."""

    def __init__(self):
        self.routes, self.requests = {}, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.path)
                server.routes[self.path](self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


def sends(content=CONTENT, cut_at=None, kind="application/octet-stream", length=True):
    """A response with `content`, cut at byte `cut_at`."""

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        if length:
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:cut_at])

    return answer


def refuses(code):
    return lambda handler: handler.send_error(code)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server, an empty cache, and a published file "thing" with two URLs."""
    server = Server()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "*")
    urls = (f"{server.url}/first", f"{server.url}/second")
    pin = checkpoint.Pinned(hashlib.sha256(CONTENT).hexdigest(), *urls, file="thing.pth")
    monkeypatch.setitem(checkpoint.PUBLISHED, "thing", pin)
    server.pin, server.cache = pin, tmp_path / "home" / "hub" / "checkpoints"
    server.target = server.cache / "thing.pth"
    server.routes |= {"/first": sends(), "/second": sends()}
    yield server
    server.http.shutdown()
    server.http.server_close()


def cached(server):
    return sorted(path.name for path in server.cache.iterdir()) if server.cache.is_dir() else []


def whole(server):
    return server.target.read_bytes() == CONTENT and cached(server) == ["thing.pth"]


def refusal(server):
    """The error of a failed fetch: one line that names the file, a URL and the target path."""
    with pytest.raises(InputError) as caught:
        checkpoint.fetch("thing")
    line = str(caught.value)
    assert "\n" not in line and "thing.pth" in line and server.pin.urls[0] in line and str(server.target) in line
    return line


def test_every_published_file_is_pinned_by_its_hash_and_fetched_by_https():
    whole = {"vgg19", "vgg16", "lpips_heads", "arcface", "syncnet_v2", "wav2lip_expert",
             "blazeface", "blazeface_back", "blazeface_anchors"}
    assert set(checkpoint.PUBLISHED) == whole | {"fan", "inception"}
    for name, pin in checkpoint.PUBLISHED.items():
        assert len(pin.sha256) == 64 if name in whole else len(pin.sha256) >= 8 and pin.sha256 in pin.file
        assert set(pin.sha256) <= set("0123456789abcdef")
        assert pin.urls and all(url.startswith("https://") for url in pin.urls)
    assert len({pin.file for pin in checkpoint.PUBLISHED.values()}) == len(checkpoint.PUBLISHED)


def test_the_first_digits_of_a_hash_pin_a_file(server, monkeypatch):
    for sha, whole in ((server.pin.sha256[:8], True), (server.pin.sha256[1:9], False)):
        monkeypatch.setattr(server.pin, "sha256", sha)
        with contextlib.nullcontext() if whole else pytest.raises(InputError, match="hash"):
            assert checkpoint.fetch("thing") == server.target
    assert server.requests == ["/first"] * 2 + ["/second"]


def test_a_file_is_fetched_once_into_torch_home(server):
    assert checkpoint.fetch("thing") == server.target and whole(server)
    assert checkpoint.fetch("thing") == server.target
    assert server.requests == ["/first"]


def test_the_users_own_copy_is_used_without_a_network(server, tmp_path):
    copy = tmp_path / "my copy.pth"
    copy.write_bytes(b"mine")
    assert checkpoint.fetch("thing", copy) == copy
    with pytest.raises(InputError, match="nowhere.pth: no such file"):
        checkpoint.fetch("thing", tmp_path / "nowhere.pth")
    assert server.requests == []


def test_a_cut_download_or_another_hash_is_refused_and_nothing_stays(server):
    server.routes |= {"/first": sends(cut_at=50_000), "/second": sends(bytes(len(CONTENT)))}
    assert "hash" in refusal(server)
    assert cached(server) == [] and server.requests == ["/first", "/second"]


def test_after_a_web_page_in_place_of_the_file_the_second_url_is_tried(server):
    server.routes["/first"] = sends(b"<html>please log in</html>", kind="text/html; charset=utf-8")
    checkpoint.fetch("thing")
    assert whole(server) and server.requests == ["/first", "/second"]
    server.target.unlink()
    server.routes["/second"] = sends(b"<html>please log in</html>", length=False)
    assert refusal(server).count("hash") == 2 and cached(server) == []


def test_after_a_missing_file_the_second_url_is_tried_and_both_failures_are_named(server):
    server.routes["/first"] = refuses(404)
    checkpoint.fetch("thing")
    assert whole(server)
    server.target.unlink()
    server.routes["/second"] = refuses(410)
    line = refusal(server)
    assert "HTTP Error 404" in line and "HTTP Error 410" in line and cached(server) == []


def test_without_a_network_the_error_names_the_url_and_the_target(server):
    server.http.shutdown()
    server.http.server_close()
    assert "refused" in refusal(server) and cached(server) == []


def test_a_damaged_file_in_the_cache_is_replaced_or_named_if_the_download_fails(server):
    server.cache.mkdir(parents=True)
    server.target.write_bytes(CONTENT[:-1] + b"!")
    server.routes |= {"/first": refuses(500), "/second": refuses(500)}
    assert "damaged" in refusal(server)
    assert cached(server) == ["thing.pth"]  # the old file stays until the download succeeds
    server.routes["/second"] = sends()
    checkpoint.fetch("thing")
    assert whole(server)


def test_a_full_disk_leaves_nothing_behind(server, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.hub.shutil, "move", full)
    assert "No space left" in refusal(server) and cached(server) == []


def test_a_cache_that_cannot_be_written_is_an_error_with_its_path(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    server.target = tmp_path / "file" / "hub" / "checkpoints" / "thing.pth"
    assert "Not a directory" in refusal(server) and server.requests == []


def test_processes_that_fetch_at_the_same_time_all_get_a_complete_file(server):
    fork = multiprocessing.get_context("fork")
    together = threading.Barrier(3)

    def answer(handler):
        together.wait(20)  # all three requests arrive before the first response
        sends()(handler)

    server.routes["/first"] = answer
    workers = [fork.Process(target=checkpoint.fetch, args=("thing",)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert whole(server) and server.requests == ["/first"] * 3


# ------------------------------------------------------------------------------------------------------------
# around a training loop


def options(**changes):
    return argparse.Namespace(**dict(resume=False, overwrite=False) | changes)


def test_claim_output_makes_the_folder_and_refuses_to_overwrite_by_default(tmp_path):
    out = checkpoint.claim_output(tmp_path / "new" / "a.pt", options())
    assert out.parent.is_dir()
    out.write_bytes(b"x")
    with pytest.raises(InputError, match="--resume continues it, --overwrite starts anew"):
        checkpoint.claim_output(out, options())
    assert checkpoint.claim_output(out, options(resume=True)) == checkpoint.claim_output(out, options(overwrite=True))
    for bad in (out / "b.pt", tmp_path / "new"):  # a folder that is a file, a file that is a folder
        with pytest.raises(InputError, match="director"):
            checkpoint.claim_output(bad, options(overwrite=True))


def test_the_log_starts_with_the_options_and_resume_appends(tmp_path):
    shown = []
    bar = types.SimpleNamespace(write=shown.append)
    for resume, step in ((False, 10), (True, 20)):
        with checkpoint.open_log(tmp_path / "log.jsonl", options(resume=resume)) as log:
            line = dict(step=step, mouth=0.5, ms=100.0, images_s=40.0, waiting=0.25, gib=1.0)
            checkpoint.write_log(log, bar, line, steps=610)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 10, None, 20]
    assert lines[0]["torch"] == torch.__version__ and lines[2]["args"] == dict(resume=True, overwrite=False)
    assert shown[0] == "    10  mouth 0.500  | 100 ms, 40 images/s, 25 % waiting, 1.0 GiB, 1.0 min left"


def test_the_timer_counts_steps_images_and_waiting(monkeypatch):
    clock = iter((0.0, 1.0, 1.5, 3.0, 3.5, 4.0, 4.0))
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: next(clock))
    timer = checkpoint.StepTimer(torch.device("cpu"))
    stream = iter([dict(x=torch.ones(3))] * 2)
    assert timer.next_batch(stream)["x"].shape == (3,)  # from 1 to 1.5 s
    timer.next_batch(stream)  # from 3 to 3.5 s
    pace = timer.pace(batch=6)  # at 4 s
    assert (pace["ms"], pace["images_s"], pace["waiting"]) == (2000, 3, 0.25) and timer.steps == 0


def test_the_error_for_a_loss_that_is_nan_names_its_term():
    good = dict(a=torch.tensor(1.0))
    checkpoint.terms_to_floats(good, 3)
    for value in (math.nan, math.inf):
        with pytest.raises(InputError, match=f"step 7: the loss term 'b' is {value}"):
            checkpoint.terms_to_floats(good | dict(b=torch.tensor(value)), 7)


def test_the_learning_rate_rises_during_warmup_and_falls_to_a_twentieth():
    factors = [checkpoint.cosine_warmup(step, 1000, 50) for step in range(1000)]
    assert factors[0] == 1 / 50 and max(factors) > 0.99 and abs(factors[-1] - 0.05) < 1e-3
    assert factors[:50] == sorted(factors[:50]) and factors[50:] == sorted(factors[50:], reverse=True)


def test_fp16_weights_keep_shared_tensors_shared_and_integers_integer():
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    network[1].weight = network[0].weight
    state = checkpoint.fp16_state_dict(network)
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr() and state["0.weight"].dtype == torch.float16
    assert state["2.num_batches_tracked"].dtype == torch.int64


def test_a_file_whose_network_needs_far_more_numbers_than_it_holds_takes_no_memory():
    def make():
        return torch.nn.Linear(1 << 16, 1 << 14)  # 4 GiB

    before = checkpoint.peak_memory_gib(torch.device("cpu"))
    with pytest.raises(InputError, match="w.pt: its sizes do not fit a network.*more numbers"):
        checkpoint.load_strictly(make, {"weight": torch.ones(3)}, "w.pt")
    assert checkpoint.peak_memory_gib(torch.device("cpu")) < before + 1


@pytest.mark.parametrize("bf16, device, fast, warned", [
    (True, "cpu", False, True), (True, "cpu", True, False), (False, "cpu", False, False), (True, "cuda", False, False)])
def test_bf16_on_a_cpu_without_its_instructions_is_reported(monkeypatch, capsys, bf16, device, fast, warned):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    checkpoint.warn_of_slow_bf16(argparse.Namespace(bf16=bf16), torch.device(device))
    assert ("--bf16: this CPU" in capsys.readouterr().out) == warned
