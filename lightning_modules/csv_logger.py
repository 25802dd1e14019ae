"""The CSV logger."""

from __future__ import annotations

import csv
from pathlib import Path

from pytorch_lightning import loggers
from pytorch_lightning.utilities import rank_zero_only


class CSVLogger(loggers.CSVLogger):
    """Lightning's ``CSVLogger``, which also goes on with a file that another process of the same run has begun.

    Under ``ddp_spawn`` fit and test each have processes of their own, and Lightning 2.6 knows no columns that
    are there already.
    """

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged since the last time."""
        writer = self.experiment
        file = Path(writer.metrics_file_path)
        if file.is_file():
            with file.open(newline="") as lines:
                writer.metrics_keys = next(csv.reader(lines), [])
        super().save()
