import functools

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from cleave.architectures import CutError, create_backbone, split_network
from cleave.deployment import ENVELOPE_BYTES
from cleave.lightning_modules import Frozen, HeadDistillation, Training
from cleave.losses import HeadDistillationLoss

from .split_tasks import Pairs, backbone, bottleneck_of, parts_of
from .tiny_networks import made_once

ADAM = Training(optimizer=functools.partial(torch.optim.AdamW, lr=1e-2))


def batches(n=24, shape=(1, 8, 8)):
    generator = torch.Generator().manual_seed(0)
    data = Pairs(torch.randn(n, *shape, generator=generator), torch.randint(10, (n,), generator=generator))
    return DataLoader(data, batch_size=8)


def split(settings):
    network = backbone().eval()
    return split_network(network, "layer2", torch.randn(2, 1, 8, 8), **settings)


def build(form="replace", **settings):
    teacher = {"teacher": Frozen(backbone(), "teacher.ckpt", "0" * 64)}
    network = made_once(split, {"form": form, "bottleneck": {"channels": 3, "width": 8}, "codec": {"bits": 4}})
    return HeadDistillation(network, loss=HeadDistillationLoss(), others=teacher, training=ADAM, **settings)


def teacher_of(task):
    return task.network_of("teacher")


def fit(task, callbacks=(), epochs=2, **settings):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), callbacks=list(callbacks),
        **settings,
    )  # fmt: skip
    trainer.fit(task, batches(), batches())
    return trainer


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(before: dict[str, torch.Tensor], module: nn.Module) -> bool:
    return all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("form", ["replace", "insert"])
def test_only_the_bottleneck_learns_and_the_frozen_stays_bitwise(form):
    task = build(form)
    parts, encoder = parts_of(task.network), bottleneck_of(task.network).encoder
    frozen = [teacher_of(task), parts["tail"]] + ([parts["head"]] if form == "insert" else [])
    before, learning = [snapshot(m) for m in frozen], snapshot(encoder)
    fit(task)
    assert all(same(b, m) for b, m in zip(before, frozen, strict=True))
    changed = [k for k, v in encoder.state_dict().items() if not torch.equal(v, learning[k])]
    assert set(changed) == set(learning)  # every weight and every running statistic
    trained = {id(p) for p in bottleneck_of(task.network).parameters()}
    assert {id(p) for group in task.trainer.optimizers[0].param_groups for p in group["params"]} == trained


def test_neither_tail_runs_in_training():
    task = build()
    calls = {"teacher": 0, "student": 0, "head": 0}
    head, tail = teacher_of(task).stages
    tail.register_forward_hook(lambda *_: calls.__setitem__("teacher", calls["teacher"] + 1))
    head.register_forward_hook(lambda *_: calls.__setitem__("head", calls["head"] + 1))
    task.network.stages[1].register_forward_hook(lambda *_: calls.__setitem__("student", calls["student"] + 1))
    fit(task, limit_val_batches=0)
    assert calls == {"teacher": 0, "student": 0, "head": 6}
    task.on_fit_start()
    task.training_loss(next(iter(batches())))
    assert calls["teacher"] == 0


def test_modes_are_right_at_the_first_step_of_both_epochs():
    task = build("insert")  # cut from a backbone in eval mode, which would leave BatchNorm frozen
    seen = []

    class Modes(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 0:
                parts = parts_of(module.network)
                learning = (parts["encoder"], parts["quantizer"], parts["decoder"])
                frozen = (*parts["head"], *parts["tail"], teacher_of(module))
                seen.append(
                    all(m.training for part in learning for each in part for m in each.modules())
                    and not any(m.training for part in frozen for m in part.modules())
                )

    fit(task, [Modes()])
    assert seen == [True, True]


def test_neither_checkpoint_nor_ema_holds_the_teacher(tmp_path):
    task = build()
    ema = EMAWeightAveraging(decay=0.9)
    fit(task, [ema, ModelCheckpoint(tmp_path, filename="x")], epochs=1)
    teacher = {p.data_ptr() for p in teacher_of(task).parameters()}
    averaged = ema._average_model
    assert not teacher & {p.data_ptr() for p in averaged.parameters()}
    assert teacher_of(averaged.module) is teacher_of(task)
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert checkpoint["others"] == {"teacher": {"path": "teacher.ckpt", "sha256": "0" * 64}}
    own = {f"network.{name}" for name in task.network.state_dict()}
    assert {k for k in checkpoint["state_dict"] if k.startswith("network.")} == own
    assert not [k for k in checkpoint["state_dict"] if "teacher" in k]
    assert sum(v.numel() for k, v in checkpoint["state_dict"].items()) < 1.1 * sum(
        v.numel() for v in task.network.state_dict().values()
    )


def test_ema_is_the_moving_average_of_the_weights(tmp_path):
    task = build()
    weight = bottleneck_of(task.network).encoder[0].weight
    history = [weight.detach().clone()]

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            history.append(weight.detach().clone())

    fit(task, [Record(), EMAWeightAveraging(decay=0.5), ModelCheckpoint(tmp_path, filename="x")], epochs=1)
    expected = history[1]
    for later in history[2:]:
        expected = 0.5 * expected + 0.5 * later
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"][
        "network.at:layer2.bottleneck.encoder.0.weight"
    ]
    torch.testing.assert_close(saved, expected)


def test_the_objective_is_the_distance_of_the_features():
    task = build()
    task.network.set_bits(32)  # an observed range would move between the two passes
    task.set_modes()
    images, labels = next(iter(batches())).values()
    loss = task.training_loss({"images": images, "labels": labels})["head"]
    with torch.no_grad():
        bottleneck = bottleneck_of(task.network)
        student = bottleneck.decoder(bottleneck.encoder(images))
        teacher = teacher_of(task).stages[0](images)
    expected = (student - teacher).double().square().sum() / 8
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("bf16-true", "learned"),
        ("bf16-mixed", "observed"),
        ("bf16-true", "sample"),
        pytest.param("bf16-mixed", "learned", marks=pytest.mark.slow),
        pytest.param("bf16-true", "observed", marks=pytest.mark.slow),
        pytest.param("bf16-mixed", "sample", marks=pytest.mark.slow),
    ],
)
def test_half_precision_trains_and_keeps_the_range_in_single(precision, kind):
    network = made_once(split, {"codec": {"bits": 4, "range": kind}})
    teacher = {"teacher": Frozen(backbone())}
    task = HeadDistillation(network, loss=HeadDistillationLoss(), others=teacher, training=ADAM)
    trainer = fit(task, epochs=1, precision=precision)
    trainer.test(task, batches(), verbose=False)
    assert trainer.callback_metrics["test/payload_bytes"] > 0
    quantizer = bottleneck_of(network).quantizer
    ranges = [*quantizer.parameters(), *(b for b in quantizer.buffers() if b.is_floating_point())]
    assert {tensor.dtype for tensor in ranges} <= {torch.float32}
    assert bottleneck_of(network).decoder[0].weight.dtype == (
        torch.bfloat16 if precision == "bf16-true" else torch.float32
    )


def test_bytes_are_measured_on_the_test_images():
    task = build()
    trainer = fit(task, epochs=1)
    trainer.test(task, batches(), verbose=False)
    measured = {k: v.item() for k, v in trainer.callback_metrics.items()}
    assert measured["test/payload_bytes"] == ENVELOPE_BYTES + 3 * 4 * 4 * 4 / 8
    assert measured["test/payload_to_input"] == pytest.approx(36 / 64)
    assert measured["test/payload_to_feature"] == pytest.approx(36 / (4 * 32 * 4 * 4))
    assert measured["test/payload_zstd_bytes"] > 36  # too short to compress


def test_resuming_with_another_teacher_is_refused():
    task = build()
    with pytest.raises(ValueError, match=r"teacher\.ckpt_path"):
        task.on_load_checkpoint({"others": {"teacher": {"path": "other.ckpt", "sha256": "1" * 64}}})
    task.on_load_checkpoint({"others": {"teacher": {"path": "moved/teacher.ckpt", "sha256": "0" * 64}}})


def test_without_a_teacher_it_tests_but_does_not_train():
    task = build()
    bottleneck_of(task.network).quantizer.set_range(-1.0, 1.0)
    alone = HeadDistillation(task.network, loss=HeadDistillationLoss(), training=ADAM)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.test(alone, batches(), verbose=False)
    with pytest.raises(ValueError, match="needs a teacher"):
        fit(alone)


def test_a_whole_network_is_refused():
    with pytest.raises(TypeError, match="StagedNetwork"):
        HeadDistillation(nn.Linear(2, 2), loss=HeadDistillationLoss())


def test_a_teacher_without_the_split_is_refused():
    task = build()
    other = create_backbone("cifar", "vgg11_bn", num_classes=10, in_channels=1).network
    with pytest.raises((CutError, ValueError), match="layer2"):
        HeadDistillation(task.network, loss=HeadDistillationLoss(), others={"teacher": Frozen(other)})
