import functools
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from cleave.architectures import staged_network
from cleave.deployment import ImageInput
from cleave.lightning_modules import Classification, Training
from cleave.lightning_modules.callbacks import CheckpointMetadata
from cleave.lightning_modules.callbacks.metadata import SCHEMA, read_metadata

from .split_tasks import Pairs

INPUT = ImageInput(height=2, width=2, color_mode="L", mean=(0.5,), std=(0.5,))


def fit(folder, config, hyper_parameters=None):
    network = staged_network(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.randn(2, 1, 2, 2))
    task = Classification(network, training=Training(functools.partial(torch.optim.SGD, lr=0.1)))
    if hyper_parameters:
        task.save_hyperparameters(hyper_parameters)
    steps = []
    network.stages[0].register_forward_hook(lambda *_: steps.append(1))
    data = DataLoader(Pairs(torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])), batch_size=2)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        num_sanity_val_steps=0, callbacks=[CheckpointMetadata(config, ["a", "b"], INPUT)],
    )  # fmt: skip
    try:
        trainer.fit(task, data, data)
        trainer.save_checkpoint(folder / "x.ckpt")
    finally:
        fit.steps = len(steps)
    return torch.load(folder / "x.ckpt", weights_only=True)


def test_a_checkpoint_carries_config_classes_and_input(tmp_path):
    config = {"backbone": {"name": "resnet20", "weights": None}, "tags": ["a"], "seed": 0, "lr": 1e-3}
    written = fit(tmp_path, config)["cleave"]
    assert written["config"] == config
    assert written["class_names"] == ["a", "b"]
    assert ImageInput.from_dict(written["image_input"]) == INPUT


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Path("data"), "PosixPath"),
        (functools.partial(print), "partial"),
        (OmegaConf.create([1]), "ListConfig"),
    ],
)
def test_hyper_parameters_that_would_not_load_back_are_named_before_training(tmp_path, value, kind):
    with pytest.raises(ValueError, match=rf"config\.data\.root is a {kind}"):
        fit(tmp_path, {"data": {"root": value, "seed": 0}})
    assert fit.steps == 0
    with pytest.raises(ValueError, match=rf"hyper_parameters\.root is a {kind}"):
        fit(tmp_path, {}, {"root": value})
    assert fit.steps == 0


def test_a_checkpoint_of_another_schema_says_what_wrote_it(tmp_path):
    checkpoint = fit(tmp_path, {"seed": 0})
    assert read_metadata(checkpoint, "x.ckpt")["config"] == {"seed": 0}
    for schema in (1, SCHEMA + 1):
        checkpoint["cleave"]["schema"] = schema
        with pytest.raises(ValueError, match=rf"x.ckpt was written by .* have schema {schema}.*train it again"):
            read_metadata(checkpoint, "x.ckpt")
    for foreign in ({}, {"state_dict": {}}, [1], {"cleave": 3}):
        with pytest.raises(ValueError, match=r"not written by Cleave's train\.py.*backbone\.weights=FILE"):
            read_metadata(foreign, "y.pt")
