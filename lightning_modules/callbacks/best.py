"""The best checkpoints so far, also after a run has moved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, which a run resumed into another folder takes its best files along to.

    Lightning forgets the score of a best checkpoint that lies in another folder, so that the first epoch after a resume
    would count as the best one.
    """

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps its state: beside the best one there may be the best few."""
        return super().state_key if self.save_top_k == 1 else f"{super().state_key}{{'save_top_k': {self.save_top_k}}}"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was best; the files are copied into this run's folder."""
        old, folder = Path(state_dict["best_model_path"]), str(self.dirpath)
        if not state_dict["best_model_path"]:
            state_dict = {**state_dict, "dirpath": folder, "last_model_path": ""}  # Lightning would warn of the move
        elif state_dict["dirpath"] != folder and old.is_file():
            scores = {str(old): state_dict["best_model_score"], **state_dict["best_k_models"]}
            kept = {str(Path(folder, Path(file).name)): score for file, score in scores.items() if Path(file).is_file()}
            for file in scores:
                _copy(Path(file), Path(folder, Path(file).name))
            worst = (min if self.mode == "max" else max)(kept, key=lambda file: kept[file])
            state_dict = {
                **state_dict,
                "dirpath": folder,
                "best_model_path": str(Path(folder, old.name)),
                "kth_best_model_path": worst,
                "kth_value": kept[worst],
                "best_k_models": kept,
                "last_model_path": "",
            }
        super().load_state_dict(state_dict)


@rank_zero_only
def _copy(old: Path, new: Path) -> None:
    if old.is_file():
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(old, new)
