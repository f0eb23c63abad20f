"""All stages train, resume bit for bit, respond to every loss weight, and refuse bad input before anything slow."""

import copy
import functools
import json
import os
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import checkpoint
import faces
import fusion
import initialise
import judges
import keypoints
import losses
import motion
import syncnet
import toyfaces
import train
import vision
from audio import sound_windows
from checkpoint import freeze, load_checkpoint, save_checkpoint
from data import Pack, PackWriter
from faces import TEMPLATES, box_slices, crop_face, mask_mouth
from fusion import FCTFG, CanonicalEncoder, Config, DirectMotion, weight_shapes, load_model
from landmarks import find_landmarks, load_landmarks, read_pose
from media import InputError, load_photo, run, to_tensor, to_uint8
from stylegan2 import ConvLayer, Discriminator, Generator
from syncnet import SyncNet
from vision import GradualStyleEncoder, HyperStyleNet

TRAIN_JUDGE = initialise.train_judge  # most tests replace it by an untrained judge
SAVE_EXAMPLES = train.save_examples  # most tests skip it


@pytest.fixture(scope="module", autouse=True)
def narrow_networks():
    """Few channels at each size of the dial, and short regressions before the first step"""
    at, few = Config.at.__func__, dict(dim=32, n_mlp=2, base=256, cap=32, encoder_width=8, hyper_width=8, linear=24)

    def narrow(cls, size, **changes):
        real_faces = changes.get("template", "toy") != "toy"
        return at(cls, size, **(few | dict(map_code=56 if real_faces else 16) | changes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "at", classmethod(narrow))
        patch.setattr(initialise, "MOVED_STEPS", 2)
        patch.setattr(fusion, "MouthEncoder", functools.partial(fusion.MouthEncoder, width=16))
        for name, changes in (("fit_motion_space", dict(clips=8, per_clip=8)), ("fit_encoder", dict(most=200)),
                              ("train_reader", dict(batch=32))):
            patch.setattr(initialise, name, functools.partial(getattr(initialise, name), **changes))
        yield


@pytest.fixture(scope="module")
def stages(pack, narrow_networks, tmp_path_factory):
    """Stages 1, 2 and 3 after a few steps each, and an untrained sync expert beside them"""
    out = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    net = dict(size=16, dim=32, width=0.125)
    save_checkpoint(str(out / "sync.pt"), dict(kind="syncnet", format=1, config=dict(net=net, template="toy"),
                                               networks=dict(expert=SyncNet(**net).state_dict())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialise, "train_judge", lambda *_: untrained_judge())
        patch.setattr(initialise, "FINETUNE_GENERATOR", 0)
        patch.setattr(train, "LOG_EVERY", 1)
        run_stage(pack, out, 1)
        run_stage(pack, out, 2)
        run_stage(pack, out, 2, "--part", "hyper")
        run_stage(pack, out, 3)
    return out


@pytest.fixture(scope="module")
def checkpoints(stages):
    """Checkpoints of `stages` by name"""
    return {name: load_checkpoint(stages / f"{name}.pt", name[:6])
            for name in ("stage1", "stage2", "stage2_hyper", "stage3")}


@pytest.fixture(autouse=True)
def quick_outputs(monkeypatch):
    """No training of the face judge, and no images or reports. `stages` writes those."""
    monkeypatch.setattr(initialise, "train_judge", lambda *_: untrained_judge())
    monkeypatch.setattr(train, "save_examples", lambda *_: None)
    monkeypatch.setattr(checkpoint, "write_report", lambda *_: None)
    monkeypatch.setattr(train, "write_report", lambda *_: None)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)


def untrained_judge():
    torch.manual_seed(4)
    return judges.SmallFaceJudge(width=32)


def options(pack, out, stage, *more, steps=4):
    return ["--stage", str(stage), "--data", str(pack), "--out", str(out),
            "--size", "16", "--batch", "6", "--steps", str(steps), "--device", "cpu",
            *more]


def run_stage(pack, out, stage, *more, **k):
    train.main(options(pack, out, stage, *more, **k))


def assert_equal(a, b, path=""):
    """Compares every tensor and number of two checkpoints."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            if k != "args":
                assert_equal(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage2_hyper", "stage3"])
def test_four_steps_equal_two_steps_then_resume_and_two_more(name, pack, stages, checkpoints, tmp_path, monkeypatch):
    stage, before = int(name[5]), dict(stage2="stage1", stage2_hyper="stage2", stage3="stage2_hyper").get(name)
    more = ["--part", "hyper"] if name == "stage2_hyper" else []
    more += ["--init", str(stages / f"{before}.pt")] if before else []
    more += ["--expert", str(stages / "sync.pt")] if stage == 3 else []
    monkeypatch.setattr(initialise, "FINETUNE_GENERATOR", 0)  # as in `stages`
    save = train.save_run

    def save_and_die(path, *content):
        save(path, *content)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save_run", save_and_die)
        run_stage(pack, tmp_path, stage, *more)
    torch.manual_seed(99)  # other random numbers in between
    run_stage(pack, tmp_path, stage, "--resume", *more)
    assert checkpoints[name]["step"] == 4
    assert_equal(checkpoints[name], load_checkpoint(tmp_path / f"{name}.pt", f"stage{stage}"))


def test_resumed_runs_keep_their_options_except_changeable_ones_and_print_the_changes(pack, stages, tmp_path, capsys):
    shutil.copy(stages / "stage1.pt", tmp_path / "stage1.pt")
    here = ["--stage", "1", "--out", str(tmp_path), "--resume"]
    for change in (["--size", "32"], ["--augment", "0.5"], ["--batch", "3", "--lr-gan", "0.1"]):
        assert f"cannot change {change[0]} " in refusal(capsys, [*here, *change])
    changes = ["--steps", "5", "--lr-gan", "0.0005", "--w", "r1=7", "--path", "vgg19=mine.pth"]
    train.main([*here, *changes])                                           # --size, --data, --batch: of the checkpoint
    line = capsys.readouterr().out.splitlines()[0]
    assert all(f"--{word}" in line for word in ("steps 4 -> 5", "lr-gan 0.004 -> 0.0005", "w r1 1.0 -> 7.0"))
    saved = load_checkpoint(str(tmp_path / "stage1.pt"), "stage1")
    assert saved["step"] == 5 and saved["args"]["batch"] == 6 and saved["args"]["w"]["r1"] == 7
    assert saved["args"]["path"] == dict(vgg19="mine.pth")
    assert saved["optimisers"]["g"]["param_groups"][0]["lr"] == pytest.approx(0.0005 * 4 / 5)
    assert saved["optimisers"]["d"]["param_groups"][0]["lr"] == pytest.approx(0.0005 * 16 / 17)


def test_a_run_resumed_with_another_number_of_images_per_step_sees_the_same_number_in_total(pack, stages, tmp_path):
    shutil.copy(stages / "stage1.pt", tmp_path / "stage1.pt")                # 4 steps of 6
    train.main(["--stage", "1", "--out", str(tmp_path), "--resume", "--steps", "6", "--accumulate", "2"])
    saved = load_checkpoint(str(tmp_path / "stage1.pt"), "stage1")
    assert (saved["step"], saved["images"]) == (6, 72)                       # 2 old steps of 12, 4 new steps of 12
    lines = [json.loads(line) for line in (tmp_path / "log_stage1.jsonl").read_text().splitlines()[1:]]
    assert [line["step"] for line in lines] == [2, 3, 4, 5]
    argv = ["--stage", "1", "--resume", "--accumulate", "3"]
    assert checkpoint.resume_options(train.parse, argv, train.parse(argv), saved, "here").steps == 4  # 72 / 18


def test_compiled_networks_train_like_eager_ones(pack, stages, tmp_path, monkeypatch):
    """Traced only: the next test runs the passes of the compiler."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    run_stage(pack, tmp_path, 1, "--compile", steps=1)                              # with R1 and path length
    compiled, eager = (json.loads((folder / "log_stage1.jsonl").read_text().splitlines()[1])
                       for folder in (tmp_path, stages))
    for term in ("d", "real", "fake", "adv", "r1", "path"):
        assert compiled[term] == pytest.approx(eager[term], rel=1e-4, abs=1e-6), term


def test_a_compiled_layer_gives_the_output_and_gradient_of_the_eager_layer():
    """All passes of the compiler except the generation of C++"""
    torch.manual_seed(0)
    layer, x = ConvLayer(3, 5, 1, down=True), torch.randn(2, 3, 8, 8)        # the blur defines its own gradient
    results = []
    for _ in range(2):
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))))
        layer.compile(backend="aot_eager_decomp_partition")
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)


def test_a_resumed_run_keeps_its_identity_judge_until_a_loss_weight_changes(pack, stages, tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "arcface", lambda device, path, template: freeze(untrained_judge()))
    run_stage(pack, tmp_path, 2, "--init", str(stages / "stage1.pt"), "--w", "arcface=0.1", steps=1)
    for steps, change, term in ((2, [], "arcface"), (3, ["--w", "arcface=0"], "id"), (4, ["--w", "id=2"], "id")):
        train.main(["--stage", "2", "--out", str(tmp_path), "--resume", "--steps", str(steps), *change])
        last = json.loads((tmp_path / "log_stage2.jsonl").read_text().splitlines()[-1])
        assert last["step"] == steps - 1 and term in last and len({"id", "arcface"} & set(last)) == 1


def test_optimiser_groups_do_not_depend_on_the_learning_rates():
    model, D, shapes = FCTFG(Config.at(16)), Discriminator(16, 512, 32), []
    for rate in ("4e-3", "1e-3"):  # the second is that of --lr
        opt = initialise.optimizers(model, D, train.parse(["--stage", "3", "--size", "16", "--lr-gan", rate]))[0]
        shapes.append([[q.shape for q in group["params"]] for group in opt.param_groups])
    assert shapes[0] == shapes[1]


def test_expert_wav2lip_downloads_the_published_expert(pack, tmp_path, monkeypatch):
    def fetched(device, path):
        raise InputError(f"fetched: {path}")

    monkeypatch.setattr(syncnet, "wav2lip_expert", fetched)
    with pytest.raises(InputError, match="fetched: None"):
        run_stage(pack, tmp_path, 3, "--expert", "wav2lip")


def test_each_log_line_times_the_steps_since_the_previous_line(pack, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now[0])
    batches, (forward, terms) = initialise.batches, train.STAGES["stage1"]

    def waiting(*a):
        for batch in batches(*a):
            now[0] += 1
            yield batch

    def working(*a):
        now[0] += 3
        return forward(*a)

    monkeypatch.setattr(initialise, "batches", waiting)
    monkeypatch.setitem(train.STAGES, "stage1", (working, terms))
    monkeypatch.setattr(train, "LOG_EVERY", 3)
    run_stage(pack, tmp_path, 1, "--w", "path=0", "r1=0", steps=5)
    lines = [json.loads(line) for line in (tmp_path / "log_stage1.jsonl").read_text().splitlines()[1:]]
    assert [(x["step"], x["ms"], x["images_s"], x["waiting"]) for x in lines] == [(k, 4000, 1.5, 0.25) for k in (0, 3, 4)]
    assert "d" in lines[0] and not {"r1", "path"} & lines[0].keys()  # terms of weight 0 are not computed


def test_published_files_replace_stages_1_and_2(pack, stages, tmp_path, monkeypatch):
    """Stage 2 trains pSp's encoder or HyperStyle's hypernetwork; stage 3 starts from files without either stage."""
    monkeypatch.setattr(initialise, "FINETUNE_GENERATOR", 0)
    monkeypatch.setattr(vision, "resize_to_256", lambda x: F.interpolate(x, 64))  # a sixteenth of the pixels
    torch.manual_seed(0)
    G, D = Generator(16, dim=24, n_mlp=2, base=256, cap=32), Discriminator(16, base=256, cap=32)
    encoder, hyper = GradualStyleEncoder(6, 24, 16), HyperStyleNet(weight_shapes(G), "separable", 8)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items() if k != "latent_avg"}
    torch.save(dict(g_ema=G.state_dict(), d=D.state_dict()), tmp_path / "g.pt")
    torch.save(dict(state_dict=state), tmp_path / "psp.pt")
    torch.save(dict(state_dict={f"hypernet.{k}": v for k, v in hyper.state_dict().items()}), tmp_path / "h.pt")
    given = [word for kind, name in (("generator", "g"), ("encoder", "psp"), ("hyper", "h"))
             for word in (f"--{kind}", str(tmp_path / f"{name}.pt"))] + ["--batch", "2"]

    def changed(part, author):
        return any(not torch.equal(now[f"{part}.{k}"], v) for k, v in author.named_parameters())

    for part, name in (("encoder", "stage2"), ("hyper", "stage2_hyper")):
        run_stage(pack, tmp_path / part, 2, *given, "--part", part, steps=1)
        two = load_checkpoint(str(tmp_path / part / f"{name}.pt"), "stage2")
        now = two["networks"]["model"]
        assert (changed("encoder", encoder), changed("hyper", hyper)) == (part == "encoder", part == "hyper")
        assert not changed("generator", G) and not now["encoder.latent_avg"].isnan().any()
        assert (two["config"]["encoder"], two["config"]["hyper"]) == ("psp", "separable")
        assert torch.equal(two["networks"]["feature_net"]["final_conv.0.weight"], D.final_conv[0].weight)
    monkeypatch.setattr(initialise, "fit_motion_space", lambda *a: None)
    run_stage(pack, tmp_path / "three", 3, *given, "--expert", str(stages / "sync.pt"), steps=1)
    now = load_checkpoint(str(tmp_path / "three" / "stage3.pt"), "stage3")["networks"]["model"]
    assert changed("hyper", hyper) and changed("generator", G) and changed("encoder", encoder)


def test_weights_that_a_run_cannot_continue_are_refused(pack, stages, tmp_path, capsys):
    init = "--w", "sync=0", "--init", str(stages / "weights.pt")
    with pytest.raises(InputError, match="has no mouth code"):
        run_stage(pack, tmp_path, 3, *init, "--part", "lips")
    with pytest.raises(InputError, match="its motion encoder is --motion direct"):
        run_stage(pack, tmp_path, 3, *init, "--motion", "paper")
    for more in ((), (*init, "--resume")):
        with pytest.raises(SystemExit):
            run_stage(pack, tmp_path, 3, "--part", "lips", *more)
        assert "--part lips needs --init" in capsys.readouterr().err
    state = {f"encoder.{k}": v for k, v in GradualStyleEncoder(6, 512, 16).state_dict().items() if k != "latent_avg"}
    torch.save(dict(state_dict=state, latent_avg=torch.zeros(6, 512)), tmp_path / "psp.pt")
    torch.save(dict(g=Generator(16, 24, 2, 256, 32).state_dict()), tmp_path / "g.pt")
    for more in ((), ("--generator", str(tmp_path / "g.pt"))):
        with pytest.raises(InputError, match="psp.pt: the width of its codes is not"):
            run_stage(pack, tmp_path, 3, *init, "--encoder", str(tmp_path / "psp.pt"), *more)
    assert not (tmp_path / "stage3.pt").exists()


def test_each_stage_trains_its_own_networks_only(checkpoints):
    one, two, hyper, three = checkpoints.values()

    def moved(a, b, part):
        x, y = a["networks"]["model"], b["networks"]["model"]
        return any(not torch.equal(x[k], y[k]) for k in x if k.startswith(part) and k in y)

    assert not moved(dict(networks=one["ema"]), two, "generator.")         # stage 2 keeps the generator
    assert not any(moved(dict(networks=two["ema"]), hyper, part) for part in ("generator.", "encoder.", "maps."))
    trained = ("generator.conv", "encoder.", "maps.", "hyper.", "canonical.", "audio.", "motion.")
    assert all(moved(hyper, three, part) for part in trained)
    assert not moved(hyper, three, "generator.style")                      # z -> w is trained in stage 1 only
    assert any(not torch.equal(v, three["networks"]["D"][k]) for k, v in two["networks"]["D"].items())
    features = three["networks"]["feature_net"]
    assert all(torch.equal(v, features[k]) for k, v in one["networks"]["D"].items())


def test_the_log_holds_revision_and_terms_and_the_weights_file_loads(stages):
    lines = [json.loads(line) for line in (stages / "log_stage3.jsonl").read_text().splitlines()]
    assert {"revision", "torch", "args"} <= set(lines[0])
    assert {"rec", "feat", "id", "orth", "adv", "d", "real", "fake", "ms", "images_s", "waiting"} <= set(lines[2])
    assert "sync" in lines[1] and "adv" not in lines[1]                     # even steps are five-frame windows
    assert lines[2]["sync"] == lines[1]["sync"]                             # the last value of each term
    model = load_model(str(stages / "weights.pt"))
    frames = torch.cat(list(model.animate(torch.zeros(3, 16, 16), torch.zeros(7, 1, 80, 16))))
    assert frames.shape == (7, 3, 16, 16) and torch.isfinite(frames).all()
    assert Image.open(stages / "stage3.png").size == (8 * 128, 3 * (128 + 18))  # three rows, each with a label
    page = (stages / "report.html").read_text()
    assert all(f"<h2>stage{k}</h2>" in page for k in (1, 2, 3)) and page.count("<img") == 4  # one of the hypernetwork


def start_stage3(args):
    """Networks before the first step"""
    cpu, data = torch.device("cpu"), initialise.load_data(args)
    model, D, known = initialise.build_networks(args, data, None, cpu)
    frozen = initialise.start_stage(args, model, D, data, known, cpu)
    return model, D, frozen


def test_every_loss_weight_changes_the_gradient(pack, stages, tmp_path):
    """The gradient of each term, and of each box of the reconstruction. Windows of five frames."""
    args = train.parse(options(pack, tmp_path, 3, "--init", str(stages / "stage2.pt"), steps=1))
    torch.manual_seed(1)
    model, D, frozen = start_stage3(args)
    frozen["sync"] = initialise.load_sync(str(stages / "sync.pt"), "cpu")
    initialise.optimizers(model, D, args)
    data = initialise.Clips(Pack(pack), losses.SYNC_FRAMES, 0, context=model.config.context, sync_sound="mel")
    for p in model.motion.lips[4].parameters():
        torch.nn.init.normal_(p, std=0.1)                                   # connect the sound to the image
    out = train.forward_stage3(model, torch.utils.data.default_collate([data[i] for i in range(2)]))
    learned = [p for p in model.motion.parameters() if p.requires_grad]

    def gradient(name, **w):
        loss = losses.stage3_losses(model, frozen, out, args.w | w)[name]
        found = torch.autograd.grad(loss, learned, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    for name in ("orth", "sync", "id", "feat"):
        assert gradient(name).abs().max() > 0, name
    for name in ("mouth", "eyes"):
        assert not torch.allclose(gradient("rec", **{name: 9.0}), gradient("rec"), rtol=1e-3, atol=0), name


def test_one_batch_can_be_overfitted(pack, stages):
    torch.manual_seed(0)
    more = ["--init", str(stages / "stage2.pt"), "--lr", "3e-4", "--lr-gan", "1e-3"]
    args = train.parse(options(pack, stages, 3, *more))
    model, D, _ = start_stage3(args)
    opt, _ = initialise.optimizers(model, D, args)
    data = initialise.Clips(Pack(pack), 1, 0, context=model.config.context)
    batch = torch.utils.data.default_collate([data[i] for i in range(2)])
    errors = []
    for _ in range(40):
        frames = model(batch["source"], batch["driving"], batch["mel"], context=model.config.context)[0]
        loss = (frames - batch["driving"]).abs().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        errors.append(float(loss.detach()))
    assert errors[-1] < 0.5 * errors[0], errors


def test_the_face_judge_learns_from_clips_without_photos(pack):
    before = judges.SmallFaceJudge()
    data = dict(pack=Pack(pack), photos=None, clips=np.arange(5))
    judge = TRAIN_JUDGE(data, torch.device("cpu"), seed=0, steps=30, batch=8)
    faces = torch.cat([train.to_tensor(Pack(pack).frames(c, [0, 9])) for c in range(3)])   # two frames of three people

    def margin(net):
        alike = net(faces) @ net(faces).t()
        return float((alike[0, 1] + alike[2, 3] + alike[4, 5]) / 3 - (alike[0, 2] + alike[2, 4] + alike[4, 0]) / 3)

    assert margin(judge) > margin(before) + 0.1


def test_stages_1_and_2_train_on_a_pack_of_photos_alone(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "save_examples", SAVE_EXAMPLES)
    photos, toys = tmp_path / "photos", Pack(pack)
    with PackWriter(photos, 16, "toy") as writer:
        for i in range(12):
            writer.add([toys.frame(i % 5, i)], np.zeros(0, np.float32), str(i), str(i))
    data = dict(pack=Pack(photos), photos=None, clips=np.arange(12))
    assert TRAIN_JUDGE(data, torch.device("cpu"), seed=0, steps=2, batch=4)
    for stage in (1, 2):
        run_stage(photos, tmp_path / "out", stage, steps=1)
    assert (tmp_path / "out" / "stage2.pt").exists() and (tmp_path / "out" / "stage2.png").exists()


def test_with_one_person_the_face_judge_distinguishes_clips_and_uses_no_held_out_clips(pack, monkeypatch):
    one, seen = Pack(pack), set()
    one.identity = np.zeros(5, np.int32)
    frames = one.frames
    monkeypatch.setattr(one, "frames", lambda c, ks: seen.add(int(c)) or frames(c, ks))
    data = dict(pack=one, photos=None, clips=np.arange(4))
    judge = TRAIN_JUDGE(data, torch.device("cpu"), seed=0, steps=30, batch=8)
    assert seen == {0, 1, 2, 3}
    faces = judge(torch.cat([to_tensor(frames(c, [0])) for c in range(4)]))
    assert (faces @ faces.t()).triu(1).max() < 0.99 and faces.isfinite().all()
    with pytest.raises(InputError, match="--w id=0"):
        TRAIN_JUDGE(data | dict(clips=np.arange(1)), torch.device("cpu"), seed=0, steps=1)


def test_idle_motion_comes_from_training_clips_which_repeat_if_they_are_few(monkeypatch):
    model = FCTFG(Config.at(16))
    pack = types.SimpleNamespace(n_frames=np.array([80, 80, 20, 80]))
    pack.frames = lambda c, ks: seen.append(int(c)) or np.full((3, 16, 16, len(ks)), (c + 1) * np.array(ks) // 4, "u1").T
    monkeypatch.setattr(model, "encode_driving", lambda x: x.mean((2, 3, 4))[..., None])
    monkeypatch.setattr(model.motion, "pose", lambda z: z.expand(-1, -1, model.config.pose_dim))
    seen = []
    initialise.collect_idle_motion(model, pack, np.array([3, 0, 2, 3]), torch.device("cpu"))
    assert seen == [3, 0]                                                    # 1 is held out, 2 is too short
    ends = model.motion.idle[:, -1, 0]
    assert 0 < ends[0] < ends[1] and torch.equal(ends, ends[:2].repeat(4))


CONV = "generator.conv1.conv.weight"
PORTRAIT, PORTRAIT_BOX = Path(__file__).parents[1] / "examples/astronaut.jpg", (134, 130, 382, 377)


def moving_photo(size):
    """Data of stage 3: two photos, of which the second has landmarks of no face; a clip of 30 frames"""
    photo = crop_face(load_photo(PORTRAIT), PORTRAIT_BOX, size)
    net = load_landmarks()
    points = find_landmarks(net, photo, (0, 0, size, size))
    photos = types.SimpleNamespace(size=size, frame=lambda c, k: photo)
    landmarks = types.SimpleNamespace(usable_clips=np.arange(2), clip=lambda c: [points * (1 - c)])
    sound = np.random.default_rng(0).normal(0, 0.1, 30 * 640).astype(np.float32)
    pack = types.SimpleNamespace(n_frames=[30], windows=lambda c, ks, voice_norm: sound_windows(sound, ks, voice_norm))
    return dict(pack=pack, clips=np.array([0]), landmarks=[None, landmarks],
                photos=types.SimpleNamespace(pack=photos, order=np.arange(3)))


def face_network(size):
    torch.manual_seed(0)
    model = FCTFG(Config.at(size, template="face", hyper="none", dim=32)).eval()
    model.motion.opening.copy_(torch.tensor([0.1, 0.05]))
    model.pose.std.copy_(torch.tensor([5, 5, 5, 0.05, 0.05, 0.05, 0.03]))
    model.motion.moves[0, 61:68, 1] = torch.tensor([-0.1] * 3 + [0.0] + [0.9] * 3)
    return model


def test_retrained_lips_keep_the_unit_of_the_mouth_code_and_predict_the_fitted_openings():
    lips, x = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.randn(7, 4)
    motion = types.SimpleNamespace(opening=torch.tensor([0.05, 0.06]), lips=lips)
    before = motion.lips(x)
    initialise.set_lip_unit(motion, 0.075, 0.045)
    after = motion.lips(x)
    torch.testing.assert_close(0.05 * after[:, 0] + 0.06, 0.075 * before[:, 0] + 0.045)
    torch.testing.assert_close(after[:, 1:], 1.5 * before[:, 1:])


def test_photos_are_moved_with_lips_of_speech_and_the_whole_head_stays_in_the_crop():
    model, data = face_network(64), moving_photo(64)
    moved, = initialise.photos_in_motion(model, data, np.random.default_rng(0), "cpu")
    photo, poses, blinks, opening, shape, images = moved
    assert np.array_equal(photo[0], data["photos"].pack.frame(0, 0)) and len(photo) == 1
    assert poses.shape == (5, 6) and images.shape == (5, 64, 64, 3)
    assert opening.shape == (5,) and shape.shape == (5, 5) and 0 < opening.max()
    read = read_pose(load_landmarks(), to_tensor(np.concatenate([photo, images])))
    assert np.corrcoef(read[1:, 0], poses[:, 0])[0, 1] > 0.9                 # yaw
    assert (read[1:, 6] < read[0, 6] - 0.02).tolist() == (blinks == 1).tolist() and 0 < blinks.sum() < 5
    data["landmarks"][1].usable_clips = np.array([1])
    assert not list(initialise.photos_in_motion(model, data, np.random.default_rng(0), "cpu"))
    data["pack"].frame, data["pack"].size = data["photos"].pack.frame, 64    # without photos: frames of clips
    data["landmarks"], data["photos"] = [moving_photo(64)["landmarks"][1]], None
    again, = initialise.photos_in_motion(model, data, np.random.default_rng(0), "cpu")
    assert np.array_equal(again[0], photo) and again[-1].shape == images.shape


def test_the_generator_learns_faces_that_move_and_keeps_encoder_and_lips(monkeypatch):
    model, data = face_network(16), moving_photo(64)
    photo = crop_face(data["photos"].pack.frame(0, 0), (0, 0, 64, 64), 16)
    rng, n = np.random.default_rng(0), 12
    poses, blinks, opening = np.zeros((n, 6)), np.arange(n) % 2, rng.uniform(0, 0.2, n)
    images = np.full((n, 16, 16, 3), 128, np.uint8)
    images[:, :8] += (60 * blinks - 30).astype(np.uint8)[:, None, None, None]
    moved = photo[None], poses, blinks, opening, np.zeros((n, 5)), images
    monkeypatch.setattr(initialise, "photos_in_motion", lambda *args: [moved])
    monkeypatch.setattr(initialise, "MOVED_STEPS", 60)
    monkeypatch.setattr(initialise, "LIP_WEIGHT", 0)                         # the mouths of these images are the same
    before, source = copy.deepcopy(model.state_dict()), to_tensor(photo)[None]

    def decode():  # mean brightness of the upper half in each image
        with torch.no_grad():
            codes = model.moved_codes(source, motion.Motion(poses, blinks, 0 * blinks), opening, np.zeros((n, 5)))
            return model.decode(codes)[:, :, :8].mean((1, 2, 3))

    initialise.learn_moved_photos(model, data, torch.device("cpu"))
    assert torch.corrcoef(torch.stack([decode(), torch.from_numpy(blinks).float()]))[0, 1] > 0.8
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {"motion.pose_up.weight", "motion.mouth_up.weight", CONV} <= changed
    assert all(k.startswith(("generator.", "maps.", "motion.pose_up", "motion.mouth_up")) for k in changed)
    assert not any("style" in k or k.startswith("maps.down") for k in changed)
    slow, fast = ((model.state_dict()[k] - before[k]).abs().max() for k in ("motion.mouth_up.weight", CONV))
    assert slow < 5e-5 * 60 < 0.1 * fast
    assert not any(q.requires_grad for q in model.parameters())


def test_faces_in_motion_are_to_have_the_lips_that_the_mouth_encoder_reads_in_the_moved_photo(monkeypatch):
    model, n, rng = face_network(64), 12, np.random.default_rng(0)
    photo, poses = rng.integers(0, 255, (64, 64, 3), np.uint8), np.zeros((n, 6))
    opening, shape, blinks = rng.uniform(0, 0.2, n), rng.normal(size=(n, 5)), np.zeros(n)
    with torch.no_grad():
        codes = model.moved_codes(to_tensor(photo)[None], motion.Motion(poses, blinks, blinks), opening, shape)
        own = to_uint8(model.decode(codes))
    monkeypatch.setattr(initialise, "train_regression", lambda *args: terms.append(args[-1](0).item()))
    increase, terms = [], []
    for images in (own, own[:, ::-1]):                                       # and upside down: other lips
        monkeypatch.setattr(initialise, "photos_in_motion", lambda *args, images=images: [
            (photo[None], poses, blinks, opening, shape, images)])
        for weight in (0, 1):
            monkeypatch.setattr(initialise, "LIP_WEIGHT", weight)
            initialise.learn_moved_photos(model, moving_photo(64), torch.device("cpu"))
        increase.append(terms[-1] - terms[-2])
    assert 0 <= increase[0] < 0.1 * increase[1]                              # not 0: the images are of whole grey levels


@pytest.mark.parametrize("stage, sync, due", [(1, 0, [0, 16]), (3, 0, [0, 16]), (3, 1, [1, 33])])
def test_r1_is_applied_in_every_16th_step_of_the_discriminator(stage, sync, due, pack, stages, tmp_path, monkeypatch):
    came, now = [], [-1]
    monkeypatch.setattr(losses, "r1_penalty", lambda real, score: came.append(now[0]) or score.square().mean())
    images = torch.rand(2, 3, 16, 16)                                        # in place of generated images

    def forward(model, batch):
        now[0] += 1
        frames = torch.zeros(2, 5 if sync and now[0] % 2 == 0 else 1, 3, 16, 16)
        return dict(real=images, fake=images.clone().requires_grad_(True), frames=frames)

    monkeypatch.setitem(train.STAGES, f"stage{stage}", (forward, lambda model, *_: dict(r1=next(
        q for q in model.parameters() if q.requires_grad).mean())))
    monkeypatch.setattr(initialise, "start_stage", lambda *a: {})
    for name in ("save_checkpoint", "save_run", "save_examples", "update_ema"):
        monkeypatch.setattr(train, name, lambda *a: None)
    more = ["--w", "path=0", f"sync={sync}", "--augment", "-1"]
    more += ["--init", str(stages / "stage2.pt"), "--expert", str(stages / "sync.pt")] if stage == 3 else []
    run_stage(pack, tmp_path, stage, *more, "--batch", "2", steps=due[-1] + 1)
    assert came == due


class Apple(torch.Tensor):
    """A tensor on a device without float64 and without eigenvalues"""

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("double", "linalg_eigh", "linalg_svd", "linalg_qr"):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        result = super().__torch_function__(function, kinds, args, kwargs or {})
        return result.as_subclass(torch.Tensor) if name == "cpu" else result


def test_closed_forms_are_solved_on_a_device_with_float64():
    torch.manual_seed(0)
    x, y = torch.randn(40, 6), torch.randn(40, 5)
    for a, b in zip(initialise.reduced_rank_regression(x.as_subclass(Apple), y.as_subclass(Apple), 2, 0.1),
                    initialise.reduced_rank_regression(x, y, 2, 0.1)):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b)
    shape = dict(template="face", linear=20, map_code=32, mouth_dim=3, shape_dim=2)
    model = FCTFG(Config.at(16, **shape)).eval()
    seen = [dict(image=x.as_subclass(Apple)) for x in torch.rand(160, 3, 16, 16) - 0.5]
    initialise.fit_encoder(model, seen, torch.device("cpu"), most=160)
    assert model.encoder.linear_down.weight.isfinite().all() and model.maps.coarse_rgb.weight.abs().sum() > 0


def test_the_closed_form_start_finds_planted_motion_and_ignores_the_person():
    """Codes = person + motion in two directions. The map returns the motion only."""
    torch.manual_seed(0)
    person, motion = torch.randn(900, 1, 12), torch.zeros(900, 20, 12)
    motion[..., 3:5] = torch.randn(900, 20, 2)
    person[..., 3:5] = 0
    z = (person + motion).flatten(0, 1)
    deviation = (motion - motion.mean(1, keepdim=True)).flatten(0, 1)
    down, up = initialise.reduced_rank_regression(z, deviation, rank=2, ridge=1e-6)
    assert down.shape == (2, 12) and up.shape == (12, 2)
    torch.testing.assert_close((z @ down.t()).std(0), torch.ones(2), atol=1e-3, rtol=0)
    fitted = z @ down.t() @ up.t()
    assert torch.corrcoef(torch.stack([fitted[:, 3], motion.flatten(0, 1)[:, 3]]))[0, 1] > 0.99
    assert (person.flatten(0, 1) @ down.t() @ up.t()).abs().max() < 0.1


@pytest.fixture(scope="module")
def real_packs(pack, tmp_path_factory):
    """The clips of `pack` with the template of real faces, so that the dial gives a mouth code, and 12 photos"""
    folder, toys = tmp_path_factory.mktemp("real"), Pack(pack)
    with PackWriter(folder / "clips", 16, "face") as clips:
        for c in range(len(toys)):
            clips.add(toys.frames(c, range(int(toys.n_frames[c]))), np.asarray(toys.sound(c)), str(c), str(c))
    with PackWriter(folder / "photos", 16, "face") as photos:
        for i in range(12):
            photos.add([toys.frame(i % 5, i)], np.zeros(0, np.float32), str(i), str(i))
    return folder / "clips", folder / "photos"


@pytest.fixture(scope="module")
def packs_with_landmarks(real_packs, pack, tmp_path_factory):
    """Copies of `real_packs` with the true landmarks of the drawn faces"""
    toys, folders = Pack(pack), []
    truth = np.load(toys.folder / "truth.npy")
    for source in real_packs:
        folder = tmp_path_factory.mktemp("marked") / source.name
        shutil.copytree(source, folder)
        here, points = Pack(folder), []
        for c in range(len(here)):
            photo = source.name == "photos"
            first, k = (toys.frame_start[c % 5] + c, 1) if photo else (toys.frame_start[c], here.n_frames[c])
            who = toyfaces.make_person(int(toys.identities[toys.identity[c % 5]].removeprefix("toy")))
            points.append(keypoints.toy_landmarks(who, truth[first:first + k], here.size))
        (folder / "landmarks").mkdir()
        (folder / "landmarks" / "points.bin").write_bytes(np.concatenate(points).astype("<f4").tobytes())
        lines = [faces.landmarks_header(here, "truth")] + [{}] * len(here)
        (folder / "landmarks" / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def real_stage1(packs_with_landmarks, tmp_path_factory):
    """Stage 1 on clips and photos with batch 1"""
    out = tmp_path_factory.mktemp("real1")
    run_stage(packs_with_landmarks[0], out, 1, "--photos", str(packs_with_landmarks[1]), "--batch", "1", steps=2)
    return out / "stage1.pt"


@pytest.mark.parametrize("motion, world", [("paper", "toys"), ("paper", "real"), ("direct", "real")])
def test_stages_train_with_both_motion_encoders_on_toys_and_on_real_faces_with_batch_1(
        motion, world, pack, stages, packs_with_landmarks, real_stage1, tmp_path):
    clips, more = pack, ["--motion", motion, "--expert", str(stages / "sync.pt")]
    shutil.copy(stages / "stage1.pt" if world == "toys" else real_stage1, tmp_path / "stage1.pt")
    if world == "real":
        clips, photos = packs_with_landmarks
        more += ["--photos", str(photos), "--batch", "1"]
    for stage in (2, 3):
        run_stage(clips, tmp_path, stage, *more, steps=2)
    log = [json.loads(line) for line in (tmp_path / "log_stage3.jsonl").read_text().splitlines()[1:]]
    mouth = (motion, world) == ("direct", "real")
    assert "sync" in log[0] and ("preserve" in log[1]) == mouth              # odd steps have photos
    before, after = (load_checkpoint(str(tmp_path / f"stage{k}.pt"), f"stage{k}")["networks"]["model"] for k in (2, 3))
    for part in ("generator.conv1", "encoder.blocks", "canonical.mlp", "audio.", "motion."):
        assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith(part)), part
    model = load_model(str(tmp_path / "weights.pt"))
    assert (model.config.motion, bool(model.mouth)) == (motion, mouth)
    assert torch.cat(list(model.animate(torch.zeros(3, 16, 16), torch.zeros(3, 1, 80, 16)))).isfinite().all()


def test_stage_3_starts_from_the_later_one_of_encoder_and_hypernetwork(tmp_path, monkeypatch):
    args = train.parse(["--stage", "3", "--size", "16", "--out", str(tmp_path)])
    monkeypatch.setattr(initialise, "load_checkpoint",
                        lambda path, kinds: dict(kind="stage2", config=dict(size=16), path=path))
    with pytest.raises(InputError, match="stage2.pt: no such file; train --stage 2 first"):
        initialise.load_previous(args, {})
    for names in (("stage2.pt", "stage2_hyper.pt"), ("stage2_hyper.pt", "stage2.pt")):
        for seconds, name in enumerate(names):
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (seconds, seconds))
        assert initialise.load_previous(args, {})["path"] == str(tmp_path / names[1])


def test_weights_of_64_px_are_enlarged_for_stage_3_at_128_px(tmp_path):
    args = train.parse(["--stage", "3", "--size", "128", "--init", str(tmp_path / "small.pt"), "--w", "sync=0"])
    model = FCTFG(Config.at(64, template="face", hyper="none", dim=16, cap=8, linear=20, map_code=51, encoder_width=4))
    content = dict(kind="weights", config=vars(model.config), networks=dict(model=model.state_dict()))
    save_checkpoint(args.init, content)
    large = initialise.load_previous(args, {})
    assert large["config"] == vars(model.config) | dict(size=128)
    FCTFG(Config(**large["config"])).load_state_dict(large["ema"]["model"])
    args.size = 32
    with pytest.raises(InputError, match="a network of 64 px, --size is 32"):
        initialise.load_previous(args, {})
    args.size, args.part = 128, "lips"                                       # does not train the generator
    with pytest.raises(InputError, match="a network of 64 px, --size is 128"):
        initialise.load_previous(args, {})


def test_the_papers_motion_encoder_has_no_mouth_code_and_refuses_a_stage_2_with_one(real_packs):
    pack = Pack(real_packs[0])
    for first in ("direct", "paper"):
        previous = dict(config=vars(Config.at(16, template="face", motion=first)))
        for second, mouth in (("direct", 24), ("paper", 0)):
            args = train.parse(["--stage", "2", "--size", "16", "--motion", second])
            config = initialise.make_config(args, pack, previous, {})
            assert (config.mouth_dim, config.motion) == (mouth, second)
    previous = dict(config=vars(Config.at(16, template="face")))
    with pytest.raises(InputError, match="train stage 2 with --motion paper"):
        args = train.parse(["--stage", "3", "--size", "16", "--motion", "paper"])
        initialise.make_config(args, pack, previous, {})


def test_real_faces_without_landmarks_give_a_hint_in_stage_1_and_are_refused_in_stage_2(real_packs, tmp_path, capsys):
    clips, photos = real_packs
    run_stage(clips, tmp_path, 1, "--photos", str(photos), steps=1)
    assert "from stage 2 on real faces need landmarks" in capsys.readouterr().out
    with pytest.raises(InputError, match="need landmarks, for each pack: python keypoints.py extract"):
        run_stage(clips, tmp_path, 2, "--photos", str(photos), steps=1)


MOUTH = dict(template="face", linear=20, map_code=33, mouth_dim=5, shape_dim=3)


@pytest.mark.parametrize("N", [1, 2])
def test_losses_of_a_mouth_code_are_finite_for_one_or_two_images(N):
    torch.manual_seed(0)
    model = FCTFG(Config.at(16, **MOUTH))
    out = train.forward_stage2(model, dict(image=torch.rand(N, 3, 16, 16) - 0.5))
    w = dict.fromkeys(train.WEIGHTS, 0.0) | dict(preserve=1.0, mouth_cycle=1.0)
    terms = losses.stage2_losses(model, {}, out, w)
    assert {"preserve", "mouth_cycle"} <= set(terms) and all(v.isfinite() for v in terms.values())


def test_the_lip_reader_learns_from_landmarks_and_stages_2_and_3_keep_it(
        packs_with_landmarks, real_stage1, tmp_path, monkeypatch, capsys):
    reader = initialise.train_reader
    monkeypatch.setattr(initialise, "train_reader", lambda *args: reader(*args[:-1], steps=120))
    clips, photos = packs_with_landmarks
    more = ["--photos", str(photos)]
    shutil.copy(real_stage1, tmp_path / "stage1.pt")
    run_stage(clips, tmp_path, 2, *more, steps=2)
    run_stage(clips, tmp_path, 3, *more, "--w", "sync=0", "adv=0", steps=2)
    shown = capsys.readouterr().out                                          # minutes, and the held-out error
    assert re.search(r"120 steps of the lip reader, \d+ mouths, \d\.\d min", shown)
    assert re.search(r"2 steps of the regression of lips on sound, \d clips, \d\.\d min", shown)
    assert re.search(r"lips from sound: variance explained in [12] held-out clips: -?\d+ % -> -?\d+ %", shown)
    two, three = ([json.loads(line) for line in (tmp_path / f"log_stage{k}.jsonl").read_text().splitlines()[1:]]
                  for k in (2, 3))
    assert all({"preserve", "mouth_cycle", "adv", "d"} <= set(line) for line in two)
    assert all("mouth_cycle" in line for line in three)                      # without the sync loss every step has photos
    before, after = (load_checkpoint(str(tmp_path / f"stage{k}.pt"), f"stage{k}")["networks"]["model"] for k in (2, 3))
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("mouth."))
    assert torch.equal(before["motion.mouth_up.weight"], after["motion.mouth_up.weight"])  # a closed form, not trained
    assert not torch.equal(before["motion.lips.0.weight"], after["motion.lips.0.weight"])
    model, toys = load_model(str(tmp_path / "weights.pt")), Pack(clips)
    assert model.config.shape_dim == 6
    gap = motion.lip_opening(model.motion.moves[:1].numpy())                             # for warp.py
    assert gap == pytest.approx(1, abs=0.01) and model.motion.opening.abs().min() > 0
    landmarks = faces.Landmarks(toys)
    read, true = [], []
    for c in range(len(toys)):
        read.append(model.mouth(to_tensor(toys.frames(c, range(toys.n_frames[c]))))[:, 0].detach().numpy())
        true.append(initialise.mouth_features(landmarks.clip(c))[:, 0])
    read, true = np.concatenate(read), np.concatenate(true)
    assert np.corrcoef(read, true)[0, 1] > 0.6
    targets = torch.cat(initialise.lip_targets(model, toys, landmarks, np.arange(len(toys)), "cpu"))[:, 0].numpy()
    assert abs(targets.mean() - read.mean()) < 0.5 * read.std() and np.corrcoef(targets, true)[0, 1] > 0.6
    monkeypatch.setattr(initialise, "LIP_STEPS", 2)                          # most of stage 3, not of --part lips
    run_stage(clips, tmp_path / "mine", 3, "--part", "lips", "--init", str(tmp_path / "weights.pt"), steps=3)
    assert "3 steps of the regression of lips on sound" in capsys.readouterr().out
    before, mine = model.state_dict(), load_model(str(tmp_path / "mine/weights.pt"))
    changed = {k.rpartition(".")[0] for k, v in mine.state_dict().items() if not torch.equal(v, before[k])}
    assert {"audio.0", "audio.5", "motion.fusion.convs.0", "motion.lips.0"} <= changed  # no generator, no encoder
    assert all(k.startswith(("audio", "motion.fusion", "motion.lips")) or k == "motion" for k in changed)
    with pytest.raises(InputError, match="weights.pt exists"):
        run_stage(clips, tmp_path / "mine", 3, "--part", "lips", "--init", str(tmp_path / "weights.pt"), steps=3)
    with pytest.raises(InputError, match="landmarks"):
        shutil.copytree(photos / "landmarks", tmp_path / "clips" / "landmarks")
        shutil.copytree(clips, tmp_path / "clips", dirs_exist_ok=True,
                        ignore=lambda folder, names: names if "landmarks" in folder else ["landmarks"])
        run_stage(tmp_path / "clips", tmp_path / "other", 1, *more)


def test_openings_of_all_people_get_the_same_rest_and_deviation_and_keep_their_course():
    torch.manual_seed(0)
    people = np.array([4, 9, 4])
    shapes = [torch.randn(50, 3), 1.5 * torch.randn(60, 3) + 3, torch.randn(70, 3) + 0.5]
    made = initialise.equalise_openings(shapes, people)
    one, other = torch.cat([made[0], made[2]])[:, 0], made[1][:, 0]
    assert one.quantile(0.05).item() == pytest.approx(other.quantile(0.05).item(), abs=1e-5)
    assert one.std().item() == pytest.approx(other.std().item(), rel=1e-4)
    for a, b in zip(shapes, made):
        assert all(np.corrcoef(a[:, k], b[:, k])[0, 1] > 0.9999 for k in range(3))
    torch.testing.assert_close(initialise.equalise_openings(shapes, [7, 7, 7]), shapes)     # one person: unchanged


@pytest.mark.parametrize("coarse_rgb", [0, 16])
def test_the_losses_of_images_do_not_train_the_lip_reader(coarse_rgb):
    for stage in ("2", "3"):
        model = FCTFG(Config.at(16, **MOUTH, coarse_rgb=coarse_rgb))
        initialise.optimizers(model, Discriminator(16, 512, 32), train.parse(["--stage", stage, "--size", "16"]))
        assert not any(q.requires_grad for q in model.mouth.reader.parameters())
        assert model.mouth.linear.weight.requires_grad == (coarse_rgb == 0)


def test_the_flow_fitted_before_stage_3_trains_at_a_hundredth_of_the_rate():
    model, args = FCTFG(Config.at(16, **MOUTH)), train.parse(["--stage", "3", "--size", "16"])
    groups = initialise.optimizers(model, Discriminator(16, 512, 32), args)[0].param_groups
    rate, = (group["lr"] for group in groups if any(q is model.maps.flow.weight for q in group["params"]))
    assert rate == pytest.approx(0.01 * args.lr)


def test_every_other_clip_gets_its_true_lip_shape_and_the_appearance_of_its_source():
    torch.manual_seed(0)
    model = FCTFG(Config.at(16, **MOUTH)).eval()
    batch = dict(source=torch.rand(2, 3, 16, 16) - 0.5, driving=torch.rand(2, 1, 3, 16, 16) - 0.5,
                 mel=torch.randn(2, 1 + 2 * model.config.context, 1, 80, 16))
    with torch.no_grad():
        out = train.forward_stage3(model, batch)
        shape, appearance = model.mouth(batch["driving"][:, 0])[:, :3], model.mouth(batch["source"])[:, 3:]
        pose = model.encode_driving(batch["driving"])[:, 0] - model.encode_driving(batch["source"][:, None])[:, 0]
        still = model.canonical(model.encode_source(batch["source"])) + model.motion.embed_pose(pose)
        mouth = out["z_s2c"] + out["z_c2d"][:, 0] - still
        true = model.motion.mouth_up(torch.cat([shape, appearance], 1)).unflatten(1, model.motion.shape)
    torch.testing.assert_close(mouth[0], true[0], atol=1e-4, rtol=1e-3)
    assert (mouth[1] - true[1]).abs().max() > 1e-2                           # predicted from sound
    torch.testing.assert_close(out["mouth"][:, 0, :3], shape)


def test_photos_are_driven_by_themselves_half_of_them_moved(packs_with_landmarks, tmp_path, monkeypatch):
    def seen(model, source, driving, mel, context, mouth):
        calls.append((source, driving[:, 0], mouth[:, 0]))
        return forward(model, source, driving, mel, context, mouth)

    calls, forward = [], FCTFG.forward
    monkeypatch.setattr(FCTFG, "forward", seen)
    monkeypatch.setattr(initialise, "move_photo", lambda landmarks, mean, photo, c, k, rng: 255 - photo)
    clips, photos = packs_with_landmarks
    args = train.parse(options(clips, tmp_path, 3, "--photos", str(photos), "--w", "sync=0", steps=1))
    args.batch, data, model = 24, initialise.load_data(args), FCTFG(Config.at(16, **MOUTH)).eval()
    with torch.no_grad():
        out = train.forward_stage3(model, next(initialise.load_batches(args, data, model.config, False, 0)))
    (source, driving, mouth), = calls
    photo, moved, shape = source[12:24], driving[12:24], model.mouth(source[12:24])
    assert torch.equal(photo, source[24:]) and torch.equal(moved, driving[24:])
    changed = [torch.allclose(b, -a, atol=1e-5) for a, b in zip(photo, moved)]
    assert 1 < sum(changed) < 11 and all(c or torch.equal(a, b) for a, b, c in zip(photo, moved, changed))
    assert torch.equal(out["real"][12:], moved) and len(out["fake"]) == 24 and len(out["fake_swapped"]) == 12
    own = mouth[12:24] + model.motion.appearance_part(shape)
    torch.testing.assert_close(own, shape)
    torch.testing.assert_close(mouth[24:] + model.motion.appearance_part(shape), out["target_mouth"])


def test_a_photo_without_usable_landmarks_is_not_moved():
    photo, anywhere = np.zeros((64, 64, 3), np.uint8), np.random.default_rng(0).uniform(0, 64, (1, 68, 2))
    for points in (np.full((1, 68, 2), np.nan), np.zeros((1, 68, 2)), anywhere, np.zeros((0, 68, 2))):
        landmarks, mean = types.SimpleNamespace(clip=lambda c, points=points: points), load_landmarks().solid.numpy()
        assert initialise.move_photo(landmarks, mean, photo, 0, 0, np.random.default_rng(0)) is photo


def test_a_published_generator_trains_on_real_faces_without_a_coarse_image(packs_with_landmarks, tmp_path):
    clips, photos = packs_with_landmarks
    torch.manual_seed(0)
    G, D = Generator(16, 32, 2, 512, 32), Discriminator(16, 512, 32)
    torch.save(dict(g_ema=G.state_dict(), d=D.state_dict()), tmp_path / "g.pt")
    run_stage(clips, tmp_path, 2, "--generator", str(tmp_path / "g.pt"), "--photos", str(photos), "--w", "adv=0", steps=2)
    assert load_checkpoint(str(tmp_path / "stage2.pt"), "stage2")["config"]["coarse_rgb"] == 0


def test_the_closed_form_coarse_image_reconstructs_faces_and_swaps_mouths():
    """Faces of 12 independent numbers and mouths of 3. The closed form finds and separates both."""
    torch.manual_seed(0)
    shape = dict(template="face", linear=20, map_code=24, mouth_dim=3, shape_dim=2, flow=0, pose_dim=32)
    model = FCTFG(Config.at(16, **shape)).eval()
    face, lips = torch.randn(12, 3, 16, 16), torch.randn(3, 3, 16, 16)
    face, lips = mask_mouth(face, "face", "lips"), lips - mask_mouth(lips, "face", "lips")
    model.mouth.linear = torch.nn.Linear(3 * 32 * 32, 3)                        # here the whole mouth code is linear
    model.mouth.read = lambda box: box.new_zeros(len(box), 0)
    people, mouths = torch.randn(300, 12), torch.randn(300, 3)

    def draw(people, mouths):
        return 0.1 * (torch.einsum("nk,kchw->nchw", people, face) + torch.einsum("nm,mchw->nchw", mouths, lips))

    seen = [dict(image=x) for x in draw(people, mouths)]
    initialise.fit_encoder(model, seen, torch.device("cpu"), most=300)
    other, new = torch.randn(2, 40, 12), torch.randn(2, 40, 3)                  # held-out people and mouths
    with torch.no_grad():
        for swapped in (False, True):
            mouth = model.mouth(draw(other[1], new[1])) if swapped else None
            made = model.decode(model.invert(draw(other[0], new[0]), mouth))
            wanted = draw(other[0], new[int(swapped)])
            rows, cols = box_slices(TEMPLATES["face"].lips, 16, 16)
            for part in (slice(None), (..., rows, cols)):
                error = (made - wanted)[part].square().mean() / wanted[part].square().mean()
                assert error < 0.1, (swapped, part, float(error))


def test_photos_teach_the_motion_space_which_directions_are_identity(monkeypatch):
    """In the clips of one man pose and appearance are correlated. Photos of other people separate them."""
    torch.manual_seed(0)
    L, D = 6, 24
    turn, looks = torch.linalg.qr(torch.randn(L * D, 21))[0].t().split([1, 20])

    class Codes:  # an "image" is its own code
        config = types.SimpleNamespace(motion="direct", pose_dim=2)
        canonical, motion = CanonicalEncoder(L, D, 8, 4), DirectMotion(Config.at(16, dim=D, pose_dim=2))
        encode_source = staticmethod(lambda x: x)
        encode_driving = staticmethod(lambda x: x)

    class Clips:
        n_frames = np.full(40, 8)

        def frames(self, c, k):  # his appearance changes with his pose
            angle = torch.randn(len(k), 1, generator=torch.Generator().manual_seed(int(c)))
            return (angle @ turn + 0.5 * angle @ looks.sum(0, keepdim=True)).unflatten(1, (L, D))

    strangers = [dict(image=(torch.randn(20) @ looks).unflatten(0, (L, D))) for _ in range(64 * 5)]
    monkeypatch.setattr(initialise, "to_tensor", lambda x: x)
    moved = {}
    for photos in (None, strangers):
        initialise.fit_motion_space(Codes(), Clips(), np.arange(40), torch.device("cpu"), photos, clips=40, per_clip=16)
        faces = torch.stack([photo["image"] for photo in strangers])
        moved[photos is None] = Codes.motion.pose_up(Codes.motion.pose(faces)).norm(dim=1).mean()
    assert moved[False] < 0.3 * moved[True]


def test_the_flow_moves_unseen_pictures_as_far_as_the_pose_code_says(monkeypatch):
    """A clip shows windows of smooth noise. The first number of the pose code is the place of the window in pixels."""
    torch.manual_seed(0)
    model = FCTFG(Config.at(16, template="face", map_code=80)).eval()
    P, n = model.config.pose_dim, 60 * 8
    directions = torch.linalg.qr(torch.randn(model.motion.pose_up.weight.numel() // P, P))[0]
    model.motion.pose_up.weight.data, model.maps.down.weight.data[:P] = directions, directions.t()
    model.maps.down.weight.data[P:] = model.maps.down.bias.data[:] = 0
    model.pose.mean[3:6], model.pose.std[:] = 0.5, 0.02
    noise = torch.nn.functional.avg_pool2d(3 * torch.randn(60, 3, 16, 26), 3, 1, 1).clamp(-1, 1)
    codes = torch.randn(n, P) * (torch.arange(P) > 0)
    codes[:, 0] = torch.randint(-4, 5, (n,))
    windows = [noise[k // 8, :, :, 5 + int(x):21 + int(x)] for k, x in enumerate(codes[:, 0])]
    images = ((torch.stack(windows) + 1) * 127.5).byte().movedim(1, -1).numpy()
    ranges = np.repeat(np.arange(0, n, 8), 8)[:, None] + np.array([0, 8])
    monkeypatch.setattr(initialise, "fit_pose_codes", lambda *_: (images, codes, ranges))
    initialise.fit_flow(model, None, torch.device("cpu"), 0, 200)
    _, _, flow = model.maps(model.motion.embed_pose(torch.tensor([[3.0] + (P - 1) * [0.0]])))
    x, y = (flow[0, 4:-4, 4:-4] * 16 / 2).unbind(-1)                         # in pixels
    assert (x - 3).abs().mean() < 0.3 and y.abs().mean() < 0.3


def test_held_out_clips_and_photos_are_never_trained_on(real_packs, tmp_path):
    clips, photos = (Pack(folder) for folder in real_packs)
    data = initialise.load_data(train.parse(options(clips.folder, tmp_path, 2, "--photos", str(photos.folder))))
    assert not set(data["clips"]) & set(data["held_out"]) and len(data["clips"]) + len(data["held_out"]) == len(clips)
    (tmp_path / "list").write_text("1\n2")
    listed = train.parse(options(clips.folder, tmp_path, 2, "--train", str(tmp_path / "list")))
    assert initialise.load_data(listed)["clips"].tolist() == [1, 2]
    hidden = set(data["held_out_photos"])
    assert hidden and not hidden & {data["photos"][n]["identity"] for n in range(300)}


def test_ridge_regression_gives_the_same_map_with_fewer_rows_than_columns():
    """With fewer rows than columns the smaller Gram matrix is solved. Directions beyond the rank are zero."""
    torch.manual_seed(0)
    x, y, ridge = torch.randn(9, 14).double(), torch.randn(9, 11).double(), 0.02
    full = torch.linalg.solve(x.t() @ x + ridge * 9 * torch.eye(14), x.t() @ y)
    _, _, v = torch.linalg.svd(x @ full)
    down, up = initialise.reduced_rank_regression(x, y, 4, ridge)
    torch.testing.assert_close((down.t() @ up.t()).double(), full @ v[:4].t() @ v[:4], atol=1e-5, rtol=1e-4)
    down, up = initialise.reduced_rank_regression(x, y, 10, ridge)
    assert down.shape == (10, 14) and up.shape == (11, 10) and down[9].abs().max() < 1e-6
    torch.testing.assert_close((down.t() @ up.t()).double(), full, atol=1e-5, rtol=1e-4)


def refusal(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        run(lambda: train.main(argv))
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and "Traceback" not in err
    return err


def test_user_errors_give_one_line_and_status_2(pack, stages, tmp_path, capsys):
    new = tmp_path / "new"
    assert "--resume" in refusal(capsys, options(pack, stages, 1))                                   # would overwrite
    assert "stage1.pt: no such file; train --stage 1 first" in refusal(capsys, options(pack, new, 2))
    assert "no such" in refusal(capsys, options(tmp_path / "nowhere", new, 1)).lower()
    assert "--size" in refusal(capsys, [*options(pack, new, 1), "--size", "32"])
    line = refusal(capsys, options(pack, new, 3, "--init", str(stages / "stage2.pt")))               # no sync expert
    assert f"python syncnet.py train --size 16 --data {pack}" in line and "--w sync=0 does without" in line
    assert "'stage1'" in refusal(capsys, options(pack, new, 3, "--init", str(stages / "stage1.pt"), "--w", "sync=0"))
    assert "stage1.pt" in refusal(capsys, options(pack, new, 1, "--resume"))                         # no checkpoint
    (new / "stage1.pt").write_bytes((stages / "stage1.pt").read_bytes()[:5000])
    assert "cut short" in refusal(capsys, options(pack, new, 1, "--resume"))
    assert "nonsense" in refusal(capsys, options(pack, new, 1, "--overwrite", "--device", "nonsense"))
    assert "--part" in refusal(capsys, options(pack, new, 1, "--part", "hyper", "--overwrite"))
    assert "rex=1" in refusal(capsys, options(pack, new, 1, "--overwrite", "--w", "r1=2", "rex=1"))
    assert "rec=-1" in refusal(capsys, options(pack, new, 1, "--overwrite", "--w", "rec=-1"))
    assert "vgg=x" in refusal(capsys, options(pack, new, 1, "--overwrite", "--path", "vgg=x"))
    (tmp_path / "file").write_text("x")
    assert "file" in refusal(capsys, options(pack, tmp_path / "file", 1))


def test_a_nan_loss_stops_the_run_and_keeps_the_checkpoint(pack, tmp_path, monkeypatch):
    (forward, _), calls = train.STAGES["stage1"], []

    def poisoned(model, frozen, out, w):
        calls.append(1)
        return dict(path=out["fake"].mean() * (float("nan") if len(calls) == 4 else 0))

    monkeypatch.setitem(train.STAGES, "stage1", (forward, poisoned))
    with pytest.raises(InputError, match="step 3: the loss term 'path' is nan"):
        run_stage(pack, tmp_path, 1, steps=6)
    assert load_checkpoint(str(tmp_path / "stage1.pt"), "stage1")["step"] == 2


def test_published_judges_are_the_default_from_128_px_on():
    for size, vgg, arcface, feat in ((64, 0, 0, 0.2), (128, 0.2, 0.1, 0), (256, 0.2, 0.1, 0)):
        args = train.parse(["--stage", "2", "--size", str(size)])
        assert (args.w["vgg"], args.w["arcface"], args.w["feat"]) == (vgg, arcface, feat)
    args = train.parse(["--stage", "2", "--size", "128", "--w", "vgg=0"])
    assert (args.w["vgg"], args.w["feat"]) == (0, 0.2)  # back to the discriminator's features


@pytest.mark.parametrize("more, file, flag", [
    (["--stage", "2"], "vgg19-dcbb9e9d.pth", "--w vgg=0"),
    (["--stage", "2", "--w", "vgg=0"], "recognition_arcface_ir_se50.pth", "--w arcface=0"),
    (["--stage", "3", "--data", "pack"], "lipsync_expert.pth", "--w sync=0"),
    (["--stage", "3", "--expert", "syncnet_v2"], "syncnet_v2.model", "--w sync=0"),
])
def test_without_internet_one_line_names_the_file_its_url_and_an_option(more, file, flag, tmp_path, monkeypatch):
    def offline(*_):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with pytest.raises(InputError) as caught:
        train.main(["--size", "128", "--out", str(tmp_path / "out"), "--device", "cpu", *more])
    line = str(caught.value)
    assert "\n" not in line and file in line and f"{flag} does without" in line and "https://" in line
    assert not list((tmp_path / "out").iterdir())  # the toy world is not drawn before


def test_psps_trunk_is_initialised_by_arcface_unless_arcface_is_off(monkeypatch):
    monkeypatch.setattr(initialise, "fetch", lambda name, path: path or name)

    def stop(size, generator, encoder, hyper):
        raise Killed(encoder)

    monkeypatch.setattr(initialise, "load_published", stop)
    for more, expected in (([], "arcface"), (["--path", "arcface=mine.pth"], "mine.pth"), (["--w", "arcface=0"], None),
                           (["--encoder", "psp.pt"], "psp.pt"), (["--size", "128"], None)):
        with pytest.raises(Killed) as caught:
            initialise.build_networks(train.parse(["--stage", "2", "--size", "256", *more]), {}, None, "cpu")
        assert caught.value.args == (expected,)


class TinySyncNetV2(judges.SyncNetV2):
    def __init__(self):
        torch.nn.Module.__init__(self)
        self.eye, self.ear = torch.nn.Linear(3 * 16 * 16, 7), torch.nn.Linear(13 * 20, 7)

    def face(self, frames):  # (B, 5, 3, 16, 16) -> (B, 7)
        return self.eye(frames.mean(1).flatten(1))

    def sound(self, mfcc):
        assert mfcc.shape[1:] == (13, 20)
        return self.ear(mfcc.flatten(1))


def test_syncnet_v2_works_as_the_sync_expert_of_stage_3(pack, stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judges, "syncnet_v2", lambda device, path: freeze(TinySyncNetV2()))
    run_stage(pack, tmp_path, 3, "--init", str(stages / "stage2.pt"), "--expert", "syncnet_v2", steps=2)
    assert "no independent measure" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "log_stage3.jsonl").read_text().splitlines()[1:]]
    assert lines[0]["sync"] > 0
