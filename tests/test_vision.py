"""Networks that read images: the published forms against float64 references, and their files."""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vision
from media import InputError
from stylegan2 import Generator

# ------------------------------------------------------------------------------------------------------------
# the published networks, against float64 references of their papers that use the tensors of a file only

FORMATS = Path(__file__).parent.parent.parent / "shared" / "formats"  # key lists of the published files, where present


def listed(name, part=""):
    """Key list of a published file -> {key without `part`: shape} of keys that begin with it. Skips without the list"""
    path = FORMATS / name
    if not path.is_file():
        pytest.skip(f"the key list {name} is not available")
    rows = [line.split() for line in path.read_text().splitlines() if line and not line.startswith("#")]
    shapes = {key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape, *_ in rows}
    return {key.removeprefix(part): shape for key, shape in shapes.items() if key.startswith(part)}


@functools.cache
def published_forms():
    """Each network in its published widths, without storage: name -> (network, key list, prefix there, parameters)"""
    with torch.device("meta"):
        layers = [tuple(layer.conv.weight.shape[1:3]) for layer in Generator(256).styled_convs()]
        separable, shared = (vision.HyperStyleNet(layers, form) for form in ("separable", "shared"))
        return dict(psp=(vision.GradualStyleEncoder(14), "psp_256.txt", "encoder.", 209_450_688),
                    separable=(separable, "hyperstyle_256_hypernet.txt", "hypernet.", 198_710_080),
                    shared=(shared, "hyperstyle_256_shared.txt", "hypernet.", 312_984_640))


@pytest.mark.parametrize("name", ["psp", "separable", "shared"])
def test_names_shapes_and_sizes_equal_those_of_the_published_files(name):
    network, file, part, parameters = published_forms()[name]
    assert sum(p.numel() for p in network.parameters()) == parameters
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items() if k != "latent_avg"}  # outside the state dict
    assert shapes == listed(file, part)


def lively(network, seed=0):
    """Random weights and running statistics everywhere, in eval mode -> (network, its tensors in float64)"""
    g = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2, generator=g)
        elif value.ndim == 1 and value.dtype.is_floating_point:
            value.normal_(0.3 if "relu" in key or key.endswith("2.weight") else 0, 0.3, generator=g)
        elif key.endswith("latent_avg"):
            value.normal_(generator=g)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data += 1
    return network.eval(), {k: v.double() for k, v in network.state_dict().items()}


def normed(s, name, x):
    mean, var, w, b = (s[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * w + b


def conv(s, name, x, stride=1, padding=1):
    return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), stride, padding)


def prelu(s, name, x):
    return x.clamp(min=0) + s[f"{name}.weight"][:, None, None] * x.clamp(max=0)


def leaky(x):
    return torch.where(x > 0, x, 0.01 * x)


def equalised(s, name, x):
    return x @ s[f"{name}.weight"].t() / s[f"{name}.weight"].shape[1] ** 0.5 + s[f"{name}.bias"]


def stack(s, name, x, strides):
    for i, stride in enumerate(strides):
        x = leaky(conv(s, f"{name}.convs.{2 * i}", x, stride))
    return x


def trunk_maps(s, x):
    """ArcFace's IR-SE50: the map after each of its 24 blocks"""
    x, maps = prelu(s, "input_layer.2", normed(s, "input_layer.1", conv(s, "input_layer.0", x))), []
    for i in range(24):
        stride, r = 2 if i in (0, 3, 7, 21) else 1, f"body.{i}.res_layer"
        y = conv(s, f"{r}.3", prelu(s, f"{r}.2", conv(s, f"{r}.1", normed(s, f"{r}.0", x))), stride)
        y = normed(s, f"{r}.4", y)
        gate = conv(s, f"{r}.5.fc1", y.mean((2, 3), keepdim=True), padding=0).clamp(min=0)
        gate = 1 / (1 + torch.exp(-conv(s, f"{r}.5.fc2", gate, padding=0)))
        short = f"body.{i}.shortcut_layer"
        if f"{short}.0.weight" in s:
            x = normed(s, f"{short}.1", conv(s, f"{short}.0", x, stride, 0))
        else:
            x = x[:, :, ::stride, ::stride]
        x = x + y * gate
        maps.append(x)
    return maps


def enlarged(x):
    """Twice the size, bilinear, corner pixels on corner pixels: as a matrix on each axis"""
    n = x.shape[-1]
    at = torch.arange(2 * n, dtype=x.dtype) * (n - 1) / (2 * n - 1)
    weight = (1 - (at[:, None] - torch.arange(n)).abs()).clamp(min=0)  # (2n, n)
    return weight @ x @ weight.t()


def test_psps_encoder_equals_a_float64_reference(monkeypatch):
    monkeypatch.setattr(vision, "resize_to_256", lambda x: x)                         # a quarter of the pixels
    torch.manual_seed(0)
    encoder, s = lively(vision.GradualStyleEncoder(10, dim=24, width=16))
    x = torch.rand(2, 3, 128, 128) * 2 - 1
    maps = trunk_maps(s, x.double())
    coarse = maps[23]
    middle = enlarged(coarse) + conv(s, "latlayer1", maps[20], padding=0)
    fine = enlarged(middle) + conv(s, "latlayer2", maps[6], padding=0)
    want = []
    for i in range(10):
        level, halvings = (coarse, 4) if i < 3 else (middle, 5) if i < 7 else (fine, 6)
        want.append(equalised(s, f"styles.{i}.linear", stack(s, f"styles.{i}", level, [2] * halvings).flatten(1)))
    want = torch.stack(want, 1) + s["latent_avg"]
    got = encoder(x)
    assert got.shape == (2, 10, 24)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(encoder(x[1:]), got[1:], atol=1e-4, rtol=1e-3)  # images are independent
    torch.testing.assert_close(encoder(x.contiguous(memory_format=torch.channels_last)), got, atol=1e-4, rtol=1e-3)


LAYERS = [(32, 32), (32, 32), (32, 32), (24, 32), (24, 24)]  # of a generator of 16 px; at width 4 the widest is 32


def hyperstyle_trunk(s, x):
    x = prelu(s, "relu", normed(s, "bn1", conv(s, "conv1", x, 2, 3)))
    for i in range(16):  # ResNet-34: 3, 4, 6 and 3 blocks, each stage but the first begins by halving
        b, stride = f"body.{i}", 2 if i in (3, 7, 13) else 1
        y = normed(s, f"{b}.bn1", conv(s, f"{b}.conv1", x, stride)).clamp(min=0)
        y = normed(s, f"{b}.bn2", conv(s, f"{b}.conv2", y))
        if stride == 2:
            x = normed(s, f"{b}.downsample.1", conv(s, f"{b}.downsample.0", x, 2, 0))
        x = (x + y).clamp(min=0)
    return x


def shared_head(s, b, h):
    """Loops where the authors have matrices and a view: the product's numbers in memory order are (O, I, 3, 3)"""
    code = equalised(s, f"{b}.linear", stack(s, b, h, (1, 2, 2, 2, 2)).flatten(1))
    w1, b1, w2, b2 = (s[f"shared_weight_hypernet.{k}"] for k in ("w1", "b1", "w2", "b2"))
    out = []
    for c in code:
        parts = (c @ w2 + b2).split(32)  # one code an input channel
        out.append(torch.cat([part @ w1 + b1 for part in parts]).view(32, 32, 3, 3))
    return torch.stack(out)


def separable_head(s, b, h, O, I):  # noqa: E741
    code = stack(s, b, h, (2, 2, 2, 2)).flatten(1)
    o = f"{b}.output.0"

    def linear(name, x):
        return x @ s[f"{o}.{name}.weight"].t() + s[f"{o}.{name}.bias"]

    kernels = torch.zeros(len(code), O, I, 3, 3, dtype=code.dtype)
    for tap in range(9):
        a = linear("make_kernel_in", code)[:, tap * I:(tap + 1) * I]
        c = linear("make_kernel_out", code)[:, tap * O:(tap + 1) * O]
        plane = linear("kernel_linear_in", torch.einsum("no,ni->noi", c, a))
        plane = linear("kernel_linear_out", plane.transpose(1, 2)).transpose(1, 2)
        kernels[:, :, :, tap // 3, tap % 3] = plane
    return kernels


@pytest.mark.parametrize("form", ["shared", "separable"])
def test_hyperstyles_hypernetwork_equals_a_float64_reference(form):
    torch.manual_seed(0)
    network, s = lively(vision.HyperStyleNet(LAYERS, form, width=4))
    x, y = (torch.rand(3, 3, 256, 256) * 2 - 1 for _ in "xy")
    h = hyperstyle_trunk(s, torch.cat([x, y], 1).double())
    got = network(x, y)
    for delta, (O, I), place in zip(got, LAYERS, (0, 2, 3, 5, 6)):  # places 1 and 4 belong to toRGB layers  # noqa: E741
        b = f"refinement_blocks.{place}"
        if (O, I) == (32, 32):
            want = shared_head(s, b, h)
        elif form == "separable":
            want = separable_head(s, b, h, O, I)
        else:
            pooled = stack(s, b, h, (2, 2, 2)).mean((2, 3), keepdim=True)
            want = conv(s, f"{b}.output.1", pooled, padding=0).view(3, O, I, 1, 1)
        torch.testing.assert_close(delta.double(), want, atol=1e-4, rtol=1e-3)
    alone = network(x[1:2], y[1:2])
    for delta, one in zip(got, alone):
        torch.testing.assert_close(delta[1:2], one, atol=1e-5, rtol=1e-3)
    heads = {id(network.refinement_blocks[i].hypernet) for i in (0, 2, 3)}
    assert heads == {id(network.shared_weight_hypernet)} and network.refinement_blocks[1] is None


def test_images_are_resized_to_256_px_except_small_ones_for_the_hypernetwork():
    x = torch.rand(2, 3, 512, 512)
    torch.testing.assert_close(vision.resize_to_256(x), F.avg_pool2d(x, 2))
    assert vision.resize_to_256(x[..., :64, :64]).shape == (2, 3, 256, 256)
    network, seen = vision.HyperStyleNet(LAYERS, "separable", width=4).eval(), []
    network.body.register_forward_hook(lambda module, given, made: seen.append(made.shape[2:]))
    for size in (512, 64):
        network(x[..., :size, :size], x[..., :size, :size])
    assert seen == [(16, 16), (4, 4)]
    encoder = vision.GradualStyleEncoder(1, dim=4, width=16).eval()
    encoder.input_layer.register_forward_hook(lambda module, given, made: seen.append(made.shape[2:]))
    encoder(x[:1, ..., :8, :8])
    assert seen[2:] == [(256, 256)]


def psp_file(path, L=10, **more):
    """A file as pSp's training writes it, with a narrow encoder"""
    encoder, _ = lively(vision.GradualStyleEncoder(L, dim=24, width=16), seed=L)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items() if k != "latent_avg"}
    state |= {f"decoder.{k}": v for k, v in Generator(16, dim=24, n_mlp=2, base=256, cap=32).state_dict().items()}
    torch.save(dict(state_dict=state, latent_avg=encoder.latent_avg, opts=dict(output_size=64)) | more, path)
    return encoder


def test_a_psp_file_loads_and_one_with_more_styles_gives_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "resize_to_256", lambda x: x)                         # a sixteenth of the pixels
    x, path = torch.rand(1, 3, 64, 64) * 2 - 1, tmp_path / "psp.pt"
    author = psp_file(path)
    assert torch.equal(vision.load_encoder(path, 10).eval()(x), author(x))
    assert torch.equal(vision.load_encoder(path, 8).eval()(x), author(x)[:, :8])
    psp_file(path, latent_avg=torch.full((24,), 2.0))
    assert vision.load_encoder(path, 10).latent_avg.equal(torch.full((10, 24), 2.0))
    psp_file(path, latent_avg=None)
    assert vision.load_encoder(path, 10).latent_avg.isnan().all()


def test_an_arcface_file_gives_a_trunk_with_new_heads(tmp_path):
    path = tmp_path / "file.pt"
    author, _ = lively(vision.GradualStyleEncoder(8, dim=24, width=16))
    state = {k: v for k, v in author.state_dict().items() if k.startswith(("input_layer", "body"))}
    torch.save(state | {"output_layer.3.weight": torch.ones(24, 9)}, path)  # bare keys
    trunk = vision.load_encoder(path, 8)
    assert isinstance(trunk, vision.GradualStyleEncoder) and trunk.latent_avg.isnan().all()
    assert trunk.body[20].res_layer[1].weight.equal(author.body[20].res_layer[1].weight)


@pytest.mark.parametrize("form", ["shared", "separable"])
def test_a_hyperstyle_file_loads_in_its_form(tmp_path, form):
    path = tmp_path / "hyper.pt"
    author, _ = lively(vision.HyperStyleNet(LAYERS, form, width=4))
    torch.save(dict(state_dict={f"hypernet.{k}": v for k, v in author.state_dict().items()}, latent_avg=None), path)
    network, found = vision.load_hypernet(path, LAYERS)
    assert found == form
    for a, b in zip(network.state_dict().values(), author.state_dict().values()):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="hyper.pt: not the weights of HyperStyleNet"):
        vision.load_hypernet(path, LAYERS[:3])  # for another generator


def test_unsuitable_files_are_refused_in_one_line(tmp_path):
    """Other defects of files: see test_checkpoint.py"""
    path, good = tmp_path / "bad.pt", tmp_path / "good.pt"
    psp_file(good)
    state = torch.load(good, weights_only=True)["state_dict"]
    for content, match in ((dict(state_dict=state, latent_avg=torch.ones(10, 9)), "latent_avg"),
                           (dict(state_dict=[1]), "expected a dict"), (dict(g_ema={}), "not pSp's encoder")):
        torch.save(content, path)
        with pytest.raises(InputError, match=f"bad.pt.*{match}"):
            vision.load_encoder(path, 10)
    with pytest.raises(InputError, match="latent_avg"):
        vision.load_encoder(good, 12)  # fewer styles than the generator has
    with pytest.raises(InputError, match="not a HyperStyle checkpoint"):
        vision.load_hypernet(good, LAYERS)
