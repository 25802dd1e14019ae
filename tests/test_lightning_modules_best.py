import functools

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from cleave.architectures import staged_network
from cleave.lightning_modules import Classification, Training
from cleave.lightning_modules.callbacks import BestCheckpoint

from .split_tasks import Pairs

SGD = Training(functools.partial(torch.optim.SGD, lr=0.0))


class Scripted(Classification):
    """Reports a validation accuracy of its own for each epoch."""

    scores = (0.2, 0.9, 0.5, 0.6)

    def on_validation_epoch_end(self):
        self.log("val/acc", self.scores[self.current_epoch])


def fit(folder, epochs, ckpt_path=None, top=None):
    network = staged_network(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.randn(2, 1, 2, 2))
    task = Scripted(network, training=SGD)
    data = DataLoader(Pairs(torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])), batch_size=2)
    best = BestCheckpoint(folder, filename="best", monitor="val/acc", mode="max", enable_version_counter=False)
    callbacks = [best]
    if top is not None:
        callbacks.append(BestCheckpoint(folder / "top", monitor="val/acc", mode="max", save_top_k=top))
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, data, data, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return best


def test_a_run_resumed_into_another_folder_keeps_its_best(tmp_path):
    fit(tmp_path / "old", 2)
    best = fit(tmp_path / "new", 4, tmp_path / "old/last.ckpt")
    assert best.best_model_path == str(tmp_path / "new/best.ckpt")
    assert round(float(best.best_model_score), 6) == 0.9
    assert torch.load(tmp_path / "new/best.ckpt", weights_only=True)["epoch"] == 1
    assert (tmp_path / "old/best.ckpt").is_file()


def test_a_better_epoch_after_the_move_replaces_it(tmp_path):
    fit(tmp_path / "old", 1)
    best = fit(tmp_path / "new", 2, tmp_path / "old/last.ckpt")
    assert torch.load(tmp_path / "new/best.ckpt", weights_only=True)["epoch"] == 1
    assert round(float(best.best_model_score), 6) == 0.9
    assert torch.load(tmp_path / "old/best.ckpt", weights_only=True)["epoch"] == 0


def test_the_best_few_stand_beside_the_best_and_move_along(tmp_path):
    def epochs_kept(folder):
        files = (folder / "top").glob("*.ckpt")
        return sorted(torch.load(file, weights_only=True)["epoch"] for file in files)

    fit(tmp_path / "old", 3, top=2)
    assert epochs_kept(tmp_path / "old") == [1, 2]
    best = fit(tmp_path / "new", 4, tmp_path / "old/last.ckpt", top=2)
    assert epochs_kept(tmp_path / "new") == [1, 3]
    assert epochs_kept(tmp_path / "old") == [1, 2]
    assert torch.load(best.best_model_path, weights_only=True)["epoch"] == 1
