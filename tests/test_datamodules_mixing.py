"""Mixup, CutMix, colour jitter, erasing and a user's own transforms: in training alone, and the same on resume."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from cleave.architectures import multi_exit_network, split_network
from cleave.architectures.backbones.zoo import CifarResNet
from cleave.datamodules import Digits
from cleave.datamodules.extras import built, further_transforms
from cleave.datamodules.mixing import Mixing
from cleave.lightning_modules import (
    Classification,
    ExitsDistilled,
    ExitsJoint,
    Frozen,
    KnowledgeDistillation,
    ZeroTimeWaste,
)
from cleave.lightning_modules.optimization.schedules import WarmupCosineLR
from cleave.losses import ExitDistillationLoss, GeometricEnsembleLoss, JointExitLoss, KnowledgeDistillationLoss
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import restore, restore_data
from cleave.scripts.train import train

from .training_helpers import PLAIN, KilledError, differences, load, quiet_trainer, small

IMAGES = torch.randint(0, 256, (6, 3, 8, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 1, 0])


def seeds(number: int, count: int = 6) -> np.ndarray:
    return np.arange(number * 1000, number * 1000 + count, dtype=np.uint64)


# --- mixing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_mixup_is_the_papers_sum_of_images_and_of_labels(alpha):
    images, labels = Mixing(alpha, 0.0, 4)(IMAGES, LABELS, seeds(1))
    share = float(labels[1, 1])  # neighbours 0 and 1
    assert labels[1].tolist() == pytest.approx([1 - share, share, 0, 0], abs=1e-6)
    expected = share * IMAGES.double() + (1 - share) * IMAGES.roll(1, 0).double()
    assert images.dtype == torch.uint8
    assert (images.double() - expected).abs().max() <= 0.5 + 1e-4
    assert torch.allclose(labels.sum(1), torch.ones(6))


def test_cutmix_puts_in_a_rectangle_whose_area_is_its_share_of_the_label():
    mixing = Mixing(0.0, 1.0, 4)
    cut = 0
    for number in range(20):
        images, labels = mixing(IMAGES, LABELS, seeds(number))
        other = (images != IMAGES).any(1)
        assert torch.equal(images.where(~other[:, None], images), images)
        assert bool(((images == IMAGES) | (images == IMAGES.roll(1, 0))).all())
        area = float(1 - labels[1, 1]) * 80
        assert area == pytest.approx(round(area), abs=1e-4)
        assert int(other[1].sum()) <= round(area)  # equal pixels of the two pictures do not show
        cut += int(other[1].sum()) > 0
    assert cut > 10


def test_the_share_has_the_beta_distribution_and_both_kinds_are_drawn_at_even_odds():
    mixing = Mixing(2.0, 1.0, 4)
    shares, kinds = [], []
    for number in range(400):
        images, labels = mixing(IMAGES, LABELS, seeds(number))
        whole = bool(((images == IMAGES) | (images == IMAGES.roll(1, 0))).all())
        kinds.append(whole)
        if not whole:
            shares.append(float(labels[1, 1]))
    assert 0.4 < np.mean(kinds) < 0.6
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert np.var(shares) == pytest.approx(1 / 20, rel=0.35)  # of Beta(2, 2)


def test_equal_seeds_mix_alike_and_others_do_not():
    mixing = Mixing(1.0, 1.0, 4)
    one, other, third = (mixing(IMAGES, LABELS, seeds(number)) for number in (1, 1, 2))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[1], third[1])


@pytest.mark.parametrize(("key", "value"), [("mixup", -1), ("cutmix", float("nan")), ("mixup", "x"), ("mixup", True)])
def test_an_alpha_out_of_range_is_named(key, value):
    with pytest.raises(ValueError, match=f"{key} must be a number of at least 0"):
        Digits(**{key: value})


# --- data modules -----------------------------------------------------------------------------------------------------


def test_mixed_labels_reach_training_batches_alone():
    data = Digits(batch_size=32, mixup=0.4)
    data.setup(None)
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].shape == (32, 10)
    assert batch["labels"].dtype == torch.float32
    assert ((batch["labels"] > 0).sum(1) <= 2).all()
    for loader in (data.val_dataloader(), data.test_dataloader(), data.eval_dataloader("train")):
        assert next(iter(loader))["labels"].dtype == torch.int64
    plain = Digits(batch_size=32)
    plain.setup(None)
    assert torch.equal(next(iter(plain.val_dataloader()))["images"], next(iter(data.val_dataloader()))["images"])
    assert data.sample_batch("train", 3)["labels"].shape == (3,)


def test_the_further_transforms_change_training_images_alone_and_the_same_way_each_time():
    settings = {"color_jitter": 0.5, "random_erasing": 0.5, "transforms": [v2.RandomInvert(0.5)]}
    plain, first, second = (
        Digits(augment="none", batch_size=64, **each)  # type: ignore[arg-type]
        for each in ({}, settings, settings)
    )
    batches = []
    for data in (plain, first, second):
        data.setup(None)
        batches.append(data.dataset("train").batch([(1, index) for index in range(64)])["images"])
    assert torch.equal(batches[1], batches[2])
    changed = (batches[0] != batches[1]).flatten(1).any(1)
    assert changed.float().mean() > 0.9
    assert torch.equal(plain.dataset("val").batch(range(9))["images"], first.dataset("val").batch(range(9))["images"])


def test_transforms_by_their_description():
    blur = {"_target_": "torchvision.transforms.v2.GaussianBlur", "kernel_size": 3}
    nested = {"_target_": "torchvision.transforms.v2.RandomApply", "transforms": [blur], "p": 1.0}
    image = IMAGES[0]
    assert torch.equal(
        built({**nested, "transforms": [{**blur, "sigma": 1.0}]})(image), v2.GaussianBlur(3, sigma=1.0)(image)
    )
    _, words = further_transforms(0.4, 0.0, [nested])
    assert words != further_transforms(0.3, 0.0, [nested])[1]
    assert words != further_transforms(0.4, 0.0, [blur])[1]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"color_jitter": -1}, "brightness must be a number from 0"),
        ({"color_jitter": {"hue": 0.7}}, "hue must be a number from 0 to 0.5"),
        ({"color_jitter": {"hues": 0.1}}, r"not \['hues'\]"),
        ({"color_jitter": "strong"}, "must be a number"),
        ({"random_erasing": 1.5}, "random_erasing must lie between 0 and 1"),
        ({"transforms": {"_target_": "x.Y"}}, "transforms must be a list"),
        ({"transforms": [{"_target_": "no.such.Thing"}]}, "no.such.Thing cannot be built"),
        ({"transforms": [{"_target_": "torchvision.transforms.v2.Resize", "sizes": 3}]}, "v2.Resize cannot be built"),
    ],
)
def test_bad_settings_are_named(settings, told):
    with pytest.raises(ValueError, match=told):
        Digits(**settings)


@pytest.mark.parametrize("transform", [v2.Resize(4), v2.ToDtype(torch.float32), v2.ToPILImage()])
def test_a_transform_that_changes_size_or_type_is_refused(transform):
    data = Digits(transforms=[transform])
    with pytest.raises(ValueError, match="must keep type and size"):
        data.dataset("train").batch([0])


def test_stored_features_of_mixed_images_are_refused(tmp_path):
    data = Digits(cutmix=1.0)
    with pytest.raises(ValueError, match=r"cutmix=1\.0 mix them anew in every epoch"):
        data.cache_features(lambda batch: {}, "x", directory=tmp_path)
    with pytest.raises(ValueError, match="views=k"):
        Digits(augment="none", random_erasing=0.5).cache_features(lambda batch: {}, "x", directory=tmp_path)


def test_parts_besides_labels_are_not_mixed():
    class Scenes(Digits):
        parts = ("images", "labels", "mask")
        maps = ("mask",)

        def further_parts(self, split, source):
            return {"mask": np.zeros((len(source), 8, 8), dtype=np.int64)}

    with pytest.raises(ValueError, match="mix images and labels alone"):
        Scenes(mixup=0.2).dataset("train")


# --- tasks ------------------------------------------------------------------------------------------------------------


def tasks():
    """Tasks of all kinds of losses that read labels."""
    sample = torch.rand(2, 1, 8, 8)
    backbone = CifarResNet(8, in_channels=1)
    teacher = {"teacher": Frozen(backbone)}
    split = split_network(backbone, "layer2", sample, bottleneck={"channels": 2})
    early = multi_exit_network(backbone, sample, at=["layer1"])
    ensemble = multi_exit_network(backbone, sample, at=["layer1"], cascade=True, ensemble=True)
    yield "classification", Classification(split)
    yield "distillation", KnowledgeDistillation(split, loss=KnowledgeDistillationLoss(), others=teacher)
    yield "joint", ExitsJoint(early, loss=JointExitLoss())
    yield "distilled", ExitsDistilled(early, loss=ExitDistillationLoss())
    yield "ensemble", ZeroTimeWaste(ensemble, loss=GeometricEnsembleLoss())


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_every_loss_that_reads_labels_takes_shares_of_classes(precision):
    for name, task in tasks():
        data = Digits(batch_size=16, mixup=0.4, cutmix=1.0)
        trainer = quiet_trainer(max_steps=2, precision=precision, limit_val_batches=1, val_check_interval=1)
        trainer.fit(task, data)
        metrics = trainer.callback_metrics
        assert np.isfinite(float(metrics["train/loss"])), name
        assert 0 <= float(metrics["val/acc" if "val/acc" in metrics else "val/acc_final"]) <= 1


def test_mixed_training_resumes_exactly_and_its_checkpoint_needs_no_trust_for_transforms(tmp_path):
    own = "[{_target_: tests.test_datamodules_mixing.Darker}]"
    run = [*PLAIN, *(each.replace("training_helpers", "tests.training_helpers") for each in small("DropoutNet"))]
    run += ["data.mixup=0.4", "data.cutmix=1.0", "data.color_jitter=0.4", "data.random_erasing=0.2", "test=false"]
    run += [f"data.transforms={own}", "training=warmup_cosine", "trainer.max_epochs=2", "data.batch_size=64"]
    run += ["callbacks.last.every_n_train_steps=1", "+trainer.limit_val_batches=1", "+trainer.limit_train_batches=4"]
    train(compose_config("train", run, tmp_path / "whole"))
    stop = ["+callbacks.stop._target_=tests.training_helpers.FailAt", "+callbacks.stop.step=3"]
    with pytest.raises(KilledError):
        train(compose_config("train", [*run, *stop], tmp_path / "part"))
    last = tmp_path / "part/checkpoints/last.ckpt"
    assert 0 < load(last)["global_step"] < 8
    train(compose_config("train", [*run, f"ckpt_path={last}"], tmp_path / "part"))
    one, other = (load(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "part"))
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    assert differences({k: one[k] for k in keys}, {k: other[k] for k in keys}) == []
    restored = restore(tmp_path / "whole/checkpoints/last.ckpt", trusted=True)
    assert restored.config.data.transforms[0]["_target_"].endswith("Darker")
    nothing = compose_config("evaluate", ["ckpt_path=x"], tmp_path).data
    assert restore_data(restored, nothing).further[-1].__class__.__name__ == "RandomErasing"  # no Darker is built


class Darker:
    """A transform of one's own, which draws."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return (image * torch.rand(())).to(torch.uint8)


# --- the schedule -----------------------------------------------------------------------------------------------------


def rates(steps: int, **arguments) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = WarmupCosineLR(optimizer, **arguments)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_warmup_and_cosine_are_those_of_torch_one_after_another():
    found = rates(25, T_max=20, warmup=5, start_factor=0.1, eta_min=0.01)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    line = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15, eta_min=0.01)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [line, cosine], milestones=[5])
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    assert found[:20] == pytest.approx(expected)
    assert found[20:] == pytest.approx([0.01] * 5)  # it stays where it ends
    assert rates(20, T_max=20, warmup=0.25, start_factor=0.1, eta_min=0.01) == pytest.approx(found[:20])


@pytest.mark.parametrize("arguments", [{"warmup": -1}, {"warmup": 20}, {"start_factor": 2}, {"T_max": 0}])
def test_a_warmup_out_of_range_is_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        rates(1, **{"T_max": 20, **arguments})


def test_the_preset_of_the_schedule_composes(tmp_path):
    cfg = compose_config("train", ["training=warmup_cosine", "training.scheduler.warmup=3"], tmp_path)
    assert cfg.training.scheduler.T_max == "total_steps"
