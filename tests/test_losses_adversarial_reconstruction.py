from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from cleave.architectures import split_network
from cleave.architectures.backbones.zoo import CifarResNet
from cleave.datamodules import Digits
from cleave.lightning_modules import CrossEntropy, Term, Training
from cleave.losses import AdversarialReconstructionLoss, BoundedLoss, structural_similarity

from .training_helpers import quiet_trainer

IMAGE, Z = (1, 8, 8), (3, 4, 4)


def linear(z, image):
    layer = nn.Linear(torch.Size(z).numel(), torch.Size(image).numel())
    return nn.Sequential(nn.Flatten(), layer, nn.Unflatten(1, tuple(image)))


def deep(z, image):
    size = torch.Size(image).numel()
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(torch.Size(z).numel(), 16),
        nn.Tanh(),
        nn.Linear(16, size),
        nn.Unflatten(1, tuple(image)),
    )


def loss_of(decoders=None, **settings):
    loss = AdversarialReconstructionLoss(decoders or {"linear": linear}, **settings)
    loss.build([IMAGE, Z])
    return loss


def batch(n=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, *IMAGE), dtype=torch.uint8, generator=generator)
    return images, torch.randn(n, *Z, generator=generator)


@pytest.mark.parametrize("measure", ["mse", "ssim"])
@pytest.mark.parametrize("strength", [0.0, 0.3, 2.0])
def test_attackers_follow_their_own_loss_and_the_encoder_its_reverse(measure, strength):
    images, z = batch()
    loss = loss_of(strength=strength, measure=measure)
    apart = copy.deepcopy(loss.decoders["linear"])
    seen, own = z.clone().requires_grad_(), z.clone().requires_grad_()
    sum(loss(images, seen).values()).backward()
    restored = apart(own)
    if measure == "mse":
        alone = (restored - images.float() / 255).square().mean()
    else:
        alone = 1 - structural_similarity(restored, images / 255).mean()
    alone.backward()
    for mine, theirs in zip(loss.decoders["linear"].parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(seen.grad, -strength * own.grad, rtol=1e-6, atol=1e-9)


def test_only_the_decoder_that_restores_best_counts():
    images, z = batch()
    loss = loss_of({"linear": linear, "deep": deep})
    with torch.no_grad():
        for weight in loss.decoders["deep"].parameters():
            weight.mul_(5)
    values = loss(images, z)
    best = min(values, key=lambda name: float(values[name].detach()))
    assert best == "linear"
    seen, own = z.clone().requires_grad_(), z.clone().requires_grad_()
    sum(loss(images, seen).values()).backward()
    (loss.decoders[best](own) - images.float() / 255).square().mean().backward()
    torch.testing.assert_close(seen.grad, -own.grad, rtol=1e-6, atol=1e-9)
    assert all(weight.grad is not None for weight in loss.parameters())


@pytest.mark.parametrize(("measure", "high", "low"), [("mse", 1.0, 1e-9), ("ssim", 1.0, 0.0)])
def test_behind_the_target_the_encoder_pays_nothing(measure, high, low):
    images, z = batch()
    for target in (high, low):
        seen = z.clone().requires_grad_()
        loss = loss_of(measure=measure, target=target)
        value = sum(loss(images, seen).values())
        value.backward()
        similar = 1 - float(value.detach()) > target if measure == "ssim" else float(value.detach()) < target
        assert bool(seen.grad.any()) == similar


def test_decoders_start_anew_at_even_distances_and_once():
    images, z = batch()
    loss = loss_of(restarts=2)
    begin = copy.deepcopy(loss.decoders.state_dict())
    seen = []
    for progress in (0.0, 0.3, 0.34, 0.5, 0.67, 1.0):
        with torch.no_grad():
            for weight in loss.parameters():
                weight.add_(1)
        before = copy.deepcopy(loss.decoders.state_dict())
        state = torch.get_rng_state()
        loss(images, z, progress)
        assert torch.equal(torch.get_rng_state(), state)
        seen.append(any(not torch.equal(value, before[key]) for key, value in loss.decoders.state_dict().items()))
    assert seen == [False, False, True, False, True, False]
    assert not any(torch.equal(value, begin[key]) for key, value in loss.decoders.state_dict().items())
    other = loss_of(restarts=2)
    other.load_state_dict(loss.state_dict())
    other(images, z, 1.0)
    assert all(torch.equal(value, loss.state_dict()[key]) for key, value in other.state_dict().items())


def task_of(strength=None, **terms):
    torch.manual_seed(0)
    backbone = CifarResNet(8, in_channels=1)
    network = split_network(
        backbone, "layer1", torch.randn(2, 1, 8, 8), bottleneck={"channels": 3}, codec={"bits": 4, "range": "sample"}
    )
    if strength is not None:
        loss = AdversarialReconstructionLoss({"linear": linear, "deep": deep}, strength=strength)
        terms["attacker"] = Term(loss, of=["pixels", "student/layer1/z"])
    training = Training(optimizer=functools.partial(torch.optim.Adam, lr=1e-3))
    return CrossEntropy(network, loss=nn.CrossEntropyLoss(), extra_terms=terms, training=training)


def fitted(task, **settings):
    trainer = quiet_trainer(max_steps=4, limit_val_batches=0, **settings)
    trainer.fit(task, datamodule=Digits(image_size=8, batch_size=16))
    return task


def test_without_strength_the_network_learns_what_it_learns_without_the_term():
    alone, watched, fought = (fitted(task_of(strength)).network.state_dict() for strength in (None, 0.0, 50.0))
    assert all(torch.equal(value, watched[name]) for name, value in alone.items())
    assert not all(torch.equal(value, fought[name]) for name, value in alone.items())


def test_the_attackers_restore_the_images_as_the_device_takes_them_and_nothing_else():
    """Before they have learned anything, decoders that begin at 0 are wrong by the images' own mean square."""
    from cleave.architectures import decoder

    data, task = Digits(image_size=8, batch_size=16), task_of()
    loss = AdversarialReconstructionLoss({"conv": functools.partial(decoder, family="conv")})
    task = CrossEntropy(
        task.network,
        loss=nn.CrossEntropyLoss(),
        extra_terms={"attacker": Term(loss, of=["pixels", "student/layer1/z"])},
        training=Training(optimizer=functools.partial(torch.optim.SGD, lr=0.0)),
    )
    seen = []
    task.on_train_batch_end = lambda outputs, batch, batch_idx: seen.append(
        (float(task.losses["attacker/conv"]), float((batch["pixels"].double() / 255).square().mean()))
    )
    quiet_trainer(max_steps=2, limit_val_batches=0).fit(task, datamodule=data)
    assert [each for each, _ in seen] == pytest.approx([own for _, own in seen], rel=1e-5)
    assert min(own for _, own in seen) > 0.05


def test_what_is_normalised_is_refused():
    with pytest.raises(ValueError, match=r"images of uint8, from 0 to 255, got torch\.float32; read pixels"):
        loss_of()(torch.zeros(2, *IMAGE), torch.zeros(2, *Z))


def test_the_attackers_learn():
    task = task_of(0.0)
    before = copy.deepcopy(task.terms.state_dict())
    fitted(task)
    assert any(not torch.equal(value, before[name]) for name, value in task.terms.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"decoders": {}}, "decoders names none"),
        ({"strength": -1}, "strength must be a finite number of at least 0, got -1"),
        ({"measure": "psnr"}, "measure must be mse or ssim, got 'psnr'"),
        ({"target": 2}, "target must lie between 0 and 1, got 2"),
        ({"restarts": 1.5}, "restarts must be a whole number of at least 0, got 1.5"),
    ],
)
def test_bad_settings_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        AdversarialReconstructionLoss(**{"decoders": {"linear": linear}, **settings})


def test_a_decoder_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"the decoder 'flat' makes \(48,\) of a sample of \(3, 4, 4\)"):
        loss_of({"flat": lambda z, image: nn.Flatten()})
    with pytest.raises(ValueError, match="not built yet"):
        AdversarialReconstructionLoss({"linear": linear})(*batch())


def test_the_multiplier_holds_a_bound():
    """min (x − 3)² with x² ≤ 1: x = 1 and μ = 2, by hand."""
    bounded = BoundedLoss(Square(), threshold=1.0, weight=0.0, rate=0.02)
    assert bounded.holds is None
    x = torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.02)
    for _ in range(2000):
        optimizer.zero_grad()
        ((x - 3).square() + bounded(x)).backward()
        optimizer.step()
    assert float(x.detach()) == pytest.approx(1, abs=1e-2)
    assert float(bounded.multiplier) == pytest.approx(2, abs=2e-2)
    before = bounded.multiplier.clone()
    bounded.eval()(x)
    assert torch.equal(before, bounded.multiplier)


class Square(nn.Module):
    def forward(self, x):
        return x.square()


def test_a_bound_that_cannot_be_held_is_said_and_bounded():
    bounded = BoundedLoss(Square(), threshold=-1.0, rate=1.0, most=5.0)
    for _ in range(20):
        bounded(torch.tensor(2.0))
    assert bounded.holds is False
    assert float(bounded.multiplier) == 5
    for name, value in (("threshold", float("nan")), ("rate", 0), ("most", -1), ("weight", -1)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            BoundedLoss(Square(), **{"threshold": 1.0, name: value})


def test_structural_similarity_is_that_of_torchmetrics():
    """test_reports_attacks holds it against loops."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(3, 2, 20, 26, generator=generator, dtype=torch.float64) for _ in range(2))
    y = 0.7 * x + 0.3 * y
    theirs = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    torch.testing.assert_close(structural_similarity(x, y), theirs, rtol=1e-9, atol=1e-9)
    small = x[..., :6, :6].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: structural_similarity(z, y[..., :6, :6]), [small])
    with pytest.raises(ValueError, match="differ in shape"):
        structural_similarity(x, y[:1])
    with pytest.raises(ValueError, match=r"images of \(2, 8\) pixels have no structure"):
        structural_similarity(*[torch.zeros(1, 1, 2, 8)] * 2)
