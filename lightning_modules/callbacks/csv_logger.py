"""The CSV logger."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

from pytorch_lightning import loggers
from pytorch_lightning.utilities import rank_zero_only

from cleave.lightning_modules.signals import speaks


class CSVLogger(loggers.CSVLogger):
    """Lightning's ``CSVLogger``, which also goes on with a file that another process of the same run has begun.

    Under ``ddp_spawn`` fit and test each have processes of their own, and Lightning 2.6 knows no columns that
    are there already. Where ``version`` names the folder of an earlier run, such as that of a resumed one, Lightning
    would delete its metrics.
    """

    @property
    def experiment(self) -> Any:
        """The writer of the file, made when first asked for; on other ranks than zero a stand-in."""
        file = Path(self.log_dir, "metrics.csv")
        kept = file.read_bytes() if self._experiment is None and speaks() and file.is_file() else None
        with warnings.catch_warnings():
            if kept is not None:
                warnings.filterwarnings("ignore", r"Experiment logs directory .* exists and is not empty")
            writer = super().experiment
        if kept is not None:
            file.write_bytes(kept)
        return writer

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged since the last time."""
        writer = self.experiment
        file = Path(writer.metrics_file_path)
        if file.is_file():
            with file.open(newline="") as lines:
                writer.metrics_keys = next(csv.reader(lines), [])
        super().save()
