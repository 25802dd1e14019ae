"""The best checkpoint so far, also after a run has moved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, which a run resumed into another folder takes its best file along to.

    Lightning forgets the score of a best checkpoint that lies in another folder, so that the first epoch after a resume
    would count as the best one.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was best; its file is copied into this run's folder."""
        old, folder = Path(state_dict["best_model_path"]), str(self.dirpath)
        if not state_dict["best_model_path"]:
            state_dict = {**state_dict, "dirpath": folder, "last_model_path": ""}  # Lightning would warn of the move
        elif state_dict["dirpath"] != folder and old.is_file():
            new = Path(folder, old.name)
            _copy(old, new)
            score = state_dict["best_model_score"]
            state_dict = {
                **state_dict,
                "dirpath": folder,
                "best_model_path": str(new),
                "kth_best_model_path": str(new),
                "kth_value": score,
                "best_k_models": {str(new): score},
                "last_model_path": "",
            }
        super().load_state_dict(state_dict)


@rank_zero_only
def _copy(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(old, new)
