"""Loss terms with known answers."""

import math

import pytest
import torch

import faces
import losses


# ------------------------------------------------------------------------------------------------------------
# the terms


def test_scores_of_zero_give_2_ln_2_for_the_discriminator_and_ln_2_for_the_generator():
    zero = torch.zeros(5, 1)
    assert losses.discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert losses.generator_loss(zero).item() == pytest.approx(math.log(2), rel=1e-6)


def test_gan_losses_equal_the_logarithms_of_the_paper():
    real, fake = torch.randn(7, 1, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64)
    p_real, p_fake = 1 / (1 + torch.exp(-real)), 1 / (1 + torch.exp(-fake))
    expected = -p_real.log().mean() - (1 - p_fake).log().mean()
    assert torch.allclose(losses.discriminator_loss(real, fake), expected)
    assert torch.allclose(losses.generator_loss(fake), -p_fake.log().mean())


def test_r1_of_a_linear_discriminator_is_its_squared_weight_norm():
    real = torch.randn(4, 3, 5, 7, requires_grad=True)
    w = torch.randn(3, 5, 7, requires_grad=True)
    penalty = losses.r1_penalty(real, (real * w).sum((1, 2, 3))[:, None])
    assert torch.allclose(penalty, w.square().sum())
    penalty.backward()
    assert torch.allclose(w.grad, 2 * w)  # second order: trains the discriminator


def test_path_length_of_a_linear_generator_follows_from_its_jacobian(monkeypatch):
    N, L, D, H, W = 2, 5, 3, 4, 6
    A = torch.randn(3 * H * W, L, D, dtype=torch.float64)  # the Jacobian itself
    w_plus = torch.randn(N, L, D, dtype=torch.float64, requires_grad=True)
    fake = torch.einsum("pld,nld->np", A, w_plus).unflatten(1, (3, H, W))
    noise = torch.randn(N, 3, H, W, dtype=torch.float64)
    mean_before = torch.tensor(2.0, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    penalty, mean_path = losses.path_length_penalty(fake, w_plus, mean_before)
    lengths = []
    for n in range(N):
        columns = [A[:, i].T @ noise[n].flatten() / math.sqrt(H * W) for i in range(L)]  # J^T y, layer by layer
        lengths.append(math.sqrt(sum(float(c @ c) for c in columns) / L))
    expected_mean = 2 + 0.01 * (sum(lengths) / N - 2)
    assert mean_path.item() == pytest.approx(expected_mean) and not mean_path.requires_grad
    assert penalty.item() == pytest.approx(sum((x - expected_mean) ** 2 for x in lengths) / N)


def test_the_gradient_of_path_length_includes_the_running_mean():
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    A = torch.randn(3 * 4 * 6, 5, 3, dtype=torch.float64)
    w_plus = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)

    def penalty(scale):
        fake = scale * torch.einsum("pld,nld->np", A, w_plus).unflatten(1, (3, 4, 6))
        torch.manual_seed(3)
        return losses.path_length_penalty(fake, w_plus, torch.tensor(2.0))[0]

    slope, = torch.autograd.grad(penalty(scale), scale)
    numeric = (penalty(scale + 1e-5) - penalty(scale - 1e-5)) / 2e-5
    assert slope.item() == pytest.approx(numeric.item(), rel=1e-6)


def test_orthogonality_is_0_for_orthogonal_and_1_for_parallel_codes_of_any_length():
    z = torch.randn(2, 5, 8)  # (B, L, D)
    assert losses.orthogonality_loss(z, -3 * z[:, None].expand(2, 3, 5, 8)).item() == pytest.approx(1, abs=1e-5)
    a, b = torch.zeros(2, 5, 8), torch.zeros(2, 3, 5, 8)
    a[..., :4], b[..., 4:] = torch.randn(2, 5, 4), torch.randn(2, 3, 5, 4)
    assert losses.orthogonality_loss(a, b).item() == 0
    mixed = a[:, None] + b
    expected = a.square().sum(-1)[:, None] / mixed.square().sum(-1)  # cos^2 by Pythagoras
    assert torch.allclose(losses.orthogonality_loss(a, mixed), expected.mean())
    assert torch.allclose(losses.orthogonality_loss(7 * a, mixed), expected.mean())


def test_orthogonality_compares_equal_style_layers_only():
    a, b = torch.zeros(2, 5, 8), torch.zeros(2, 3, 5, 8)
    a[:, 0, 1], b[:, :, 1:, 1] = 1, 1  # the same direction, in other layers
    assert losses.orthogonality_loss(a, b).item() == 0


def test_reconstruction_is_0_for_equal_images_and_weights_boxes_and_pyramid():
    x = torch.rand(2, 3, 16, 24)
    assert losses.reconstruction_loss(x, x, (((0, 0, 1, 1), 5),)).item() == 0
    assert losses.reconstruction_loss(x + 0.25, x).item() == pytest.approx(0.25 * 2, rel=1e-5)
    dots = torch.zeros(2, 3, 16, 24)
    dots[..., ::2, ::2], dots[..., 1::2, 1::2] = 1, -1  # vanish in the smaller images
    assert losses.reconstruction_loss(x + dots, x).item() == pytest.approx(0.5, rel=1e-5)
    left = x.clone()
    left[..., 4:8, 6:12] += 0.5  # rows 1/4..1/2 of 16, columns 1/4..1/2 of 24: a sixteenth of the image
    inside, outside = (((0.25, 0.25, 0.5, 0.5), 3.0),), (((0.5, 0.25, 0.75, 0.5), 3.0),)
    assert losses.reconstruction_loss(left, x, inside).item() == pytest.approx(2 * 0.5 / 16 + 3 * 0.5, rel=1e-5)
    assert losses.reconstruction_loss(left, x, outside).item() == pytest.approx(2 * 0.5 / 16, rel=1e-5)


def test_perceptual_loss_is_relative_to_the_magnitude_of_each_map():
    real = [torch.rand(2, 4, 6, 5) + 0.1, 100 * torch.rand(2, 8, 3, 2) + 1]
    assert losses.perceptual_loss(real, real).item() == 0
    assert losses.perceptual_loss([1.5 * real[0], 1.1 * real[1]], real).item() == pytest.approx((0.5 + 0.1) / 2, rel=1e-4)
    for maps in real:
        maps.requires_grad_()
    losses.perceptual_loss([2 * real[0].detach().requires_grad_(), real[1].detach()], real).backward()
    assert real[0].grad is None  # the real maps are the target


def test_identity_loss_is_0_1_or_2_for_equal_orthogonal_or_opposite_embeddings():
    e = torch.eye(4)[:3]
    assert losses.identity_loss(e, e).item() == 0
    assert losses.identity_loss(e, e.roll(1, 1)).item() == 1
    assert losses.identity_loss(e, -e).item() == 2


def test_augmentation_changes_no_image_at_p_0_and_every_image_at_p_1():
    x = torch.rand(5, 3, 16, 24) * 2 - 1
    assert torch.equal(losses.Augment(0.0)(x), x)
    torch.manual_seed(0)
    y = losses.Augment(1.0)(x)
    assert y.shape == x.shape and all(not torch.equal(a, b) for a, b in zip(x, y))
    many = x.repeat(40, 1, 1, 1)
    changed = ((losses.Augment(0.05)(many) - many).abs().amax((1, 2, 3)) > 1e-5).sum()
    assert 20 < changed < 90  # 1 - 0.95^6 = 26 % of 200 images


def test_the_gradient_of_augmentation_equals_finite_differences():
    x, d = (torch.randn(3, 3, 8, 12, dtype=torch.float64) for _ in range(2))
    augment = losses.Augment(1.0)

    def value(x):
        torch.manual_seed(3)
        return augment(x).pow(2).sum()

    x.requires_grad_()
    slope = (torch.autograd.grad(value(x), x)[0] * d).sum()
    numeric = (value(x + 1e-6 * d) - value(x - 1e-6 * d)) / 2e-6
    assert slope.item() != 0 and slope.item() == pytest.approx(numeric.item(), rel=1e-6)


def test_augmentation_treats_images_independently():
    x = torch.rand(4, 3, 8, 12)
    other = x.clone()
    other[1] = torch.rand(3, 8, 12)
    torch.manual_seed(5)
    a = losses.Augment(0.7)(x)
    torch.manual_seed(5)
    b = losses.Augment(0.7)(other)
    assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])


def test_the_controller_moves_p_by_images_over_500k_towards_the_target_within_0_and_1():
    for p, sign, images, expected in ((0.5, 1.0, 32, 0.5 + 32 / 500_000), (0.5, 1 / 3, 3, 0.5 - 3 / 500_000),
                                      (1.0, 1.0, 32, 1.0), (0.0, -1.0, 32, 0.0)):
        augment = losses.Augment(p)
        augment.update(sign, images)  # 0.6 is wanted
        assert augment.p == pytest.approx(expected)


def test_preserve_loss_allows_changes_of_equal_hue_in_the_mouth_box_only():
    real = torch.rand(2, 3, 32, 32)
    rows, cols = faces.box_slices(faces.TEMPLATES["face"].mouth, 32, 32)
    swapped = real.clone()
    swapped[..., rows, cols] += 0.5                                                   # of the same hue
    assert losses.preserve_loss(swapped, real, "face").item() == pytest.approx(0, abs=1e-6)
    swapped[..., rows, cols] = 0
    assert losses.preserve_loss(swapped, real, "face") > 0                            # the mouth became grey
    brighter = losses.preserve_loss(real + 0.25, real, "face")                        # of the same hue
    outside = 1 - (rows.stop - rows.start) * (cols.stop - cols.start) / 32 ** 2
    assert brighter.item() == pytest.approx(0.25 * outside, rel=1e-4)


def test_mouth_cycle_weights_the_opening_like_all_other_numbers_together_in_units_of_variance():
    target = torch.tensor([[1.0, 0, 2], [-1, 0, -2], [0, 0, 0]])                      # variances 1, 0 (taken as .25), 4
    assert losses.mouth_cycle_loss(target, target).item() == 0
    for k, expected in ((0, 1 / 2), (1, 4 / 4), (2, 1 / 16)):
        read = target.clone()
        read[:, k] += 1
        assert losses.mouth_cycle_loss(read, target).item() == pytest.approx(expected)
    assert losses.mouth_cycle_loss(target[:1] + 1, target[:1]).item() == pytest.approx(1)  # a batch of one
