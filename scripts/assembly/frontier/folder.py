"""The folder of a frontier: what it is of, and one record for each point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cleave.deployment.bundle.canonical_json import dump, parse
from cleave.lightning_modules.checkpoints.loading import file_sha256
from cleave.planning import RecordFolder, write_whole
from cleave.reports.frontier.points import FrontierPoint
from cleave.scripts.assembly.attacking.images import own_data
from cleave.scripts.assembly.attacking.victim import Victim
from cleave.scripts.assembly.building import plain
from cleave.scripts.assembly.frontier.grid import GridPoint, attack_config, run_config
from cleave.scripts.assembly.identity import identity, image_digests, plain_data

RUNS = "runs"
_UNSEEN = ("device", "pictures")  # of an attack: where it runs, and what is drawn


class FrontierFolder(RecordFolder):
    """A folder with ``grid.json``, which says what all points share, and ``points/NAME.json`` for each of them."""

    whose, identity_file, records_folder = "frontier", "grid.json", "points"

    def find(self, point: GridPoint) -> FrontierPoint | None:
        """Return the record of a point, if there is one.

        Raises:
            ValueError: It is damaged.
        """
        file = self.record_file(point.name)
        if not file.exists():
            return None
        try:
            found = FrontierPoint.from_values(parse(file.read_bytes()))
            if found.place != point.place:
                raise ValueError(f"it is of {found.place.words()}")
        except ValueError as error:
            raise ValueError(
                f"the record {file} is damaged: {error}; delete it, and the point is trained again"
            ) from error
        return found

    def write(self, point: GridPoint, found: FrontierPoint) -> None:
        """Keep a record; one that is half written never takes its place."""
        write_whole(self.record_file(point.name), dump(found.as_values()))

    def run(self, point: GridPoint) -> Path:
        """Return where the run of a point lies."""
        return self.folder / RUNS / point.name


def shared(cfg: DictConfig, points: list[GridPoint], victim: Victim) -> dict[str, Any]:
    """Return all that the points of a frontier share, and that their figures depend on.

    Args:
        cfg: The frontier's config.
        points: Its points, whose settings are theirs alone.
        victim: The first point's network, untrained, and its data.
    """
    first = run_config(cfg, points[0].settings)
    base = run_config(first, dict.fromkeys(points[0].settings))
    assert victim.data is not None
    attack = plain(attack_config(cfg, ""))
    kept = {key: attack[key] for key in attack if key not in ("ckpt_path", "trust_checkpoint", *_UNSEEN)}
    judge = kept["judge"]
    kept["judge"] = {"layer": judge["layer"], "file": judge["ckpt_path"] and file_sha256(judge["ckpt_path"])}
    if kept["attack"].get("data"):
        own = own_data(cfg, victim)
        digests = image_digests(own, ("train", "val"))
        kept["attack"] = {**kept["attack"], "data": {**plain_data(kept["attack"]["data"]), "images": digests}}
    told = identity(base, victim.data, splits=("train", "val", "test"))
    if base.get("steps") is not None:
        told["recipe"] = plain(base)["steps"]
    return {**told, "attack": kept, "chosen_by": cfg.optimized_metric}
