"""Reads what an offline W&B run wrote: its transaction log, the file that ``wandb sync`` would send."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768  # the log is LevelDB's: blocks of records, each with a checksum, a length and its place in the whole


class OfflineRun:
    """An offline run, read back.

    Attributes:
        folder: The run's folder.
        run: The record that began it: project, group, tags, job type.
        config: The config, nested as it was given.
        history: Rows of metrics in the order logged.
        summary: The last value of every metric.
        artifacts: Artifact records by name without the run's id; W&B's own for tables by theirs.
        exit_codes: One for each time the run was finished.
    """

    def __init__(self, folder: Path) -> None:
        from wandb.proto.wandb_internal_pb2 import Record

        self.folder = folder
        self.run: Any = None
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.artifacts: dict[str, Any] = {}
        self.exit_codes: list[int] = []
        (log,) = folder.glob("run-*.wandb")
        for payload in _payloads(log.read_bytes()):
            record = Record()
            record.ParseFromString(payload)
            self._read(record)

    def _read(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.run = record.run
            _update(self.config, record.run.config.update)
        elif kind == "config":
            _update(self.config, record.config.update)
        elif kind == "summary":
            _update(self.summary, record.summary.update)
        elif kind == "history":
            self.history.append(_update({}, record.history.item))
        elif kind == "artifact":
            self.artifacts[record.artifact.name.removesuffix(f"-{self.run.run_id}")] = record.artifact
        elif kind == "exit":
            self.exit_codes.append(record.exit.exit_code)

    def series(self, metric: str) -> list[Any]:
        """The values of a metric in the order logged."""
        return [row[metric] for row in self.history if metric in row]


def offline_runs(folder: Path) -> list[OfflineRun]:
    """Every offline run below a folder, in the order of their paths.

    W&B's service may close a log after ``finish`` has returned; ending the one this process holds waits for that.
    """
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()
    return [OfflineRun(path) for path in sorted(folder.rglob("offline-run-*"))]


def _update(target: dict[str, Any], items: Any) -> dict[str, Any]:
    for item in items:
        *parents, last = item.nested_key or [item.key]
        node = target
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = json.loads(item.value_json)
    return target


def _payloads(log: bytes) -> Iterator[bytes]:
    assert log[:4] == b":W&B"
    position, whole = 7, b""
    while position + 7 <= len(log):
        left = BLOCK - position % BLOCK
        if left < 7:  # no room for a header: the block is padded
            position += left
            continue
        checksum, length, place = struct.unpack_from("<IHB", log, position)
        part = log[position + 7 : position + 7 + length]
        assert zlib.crc32(bytes([place]) + part) == checksum, f"damaged at byte {position}"
        whole += part
        position += 7 + length
        if place in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""
