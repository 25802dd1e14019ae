"""What the tests of infer.py share: what its files hold, and a stand-in for OpenCV."""

from __future__ import annotations

import csv
import json
import re
import sys
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from .deployment_networks import images, make_bundle


def bundle_and_pictures(folder: Path) -> Path:
    """Make a bundle, ``net``, and five ``pictures``."""
    make_bundle(folder / "net", "sample")
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, image in enumerate(images(5)):
        Image.fromarray(image.numpy().transpose(1, 2, 0)).save(pictures / f"{number}.png")
    return folder


def lines_of(file: Path) -> list[dict]:
    text = file.read_text()
    return list(csv.DictReader(text.splitlines())) if file.suffix == ".csv" else [*map(json.loads, text.splitlines())]


def names_of(file: Path) -> list[str]:
    return [line["image"] for line in lines_of(file)]


def notes(raised) -> str:
    return "\n".join(getattr(raised.value, "__notes__", []))


FRAME_COUNT = 7  # as OpenCV calls it by number


class CaptureError(Exception):
    """As OpenCV's own, which is none of Python's."""


class Capture:
    """A stand-in for OpenCV's reader: as many frames as the name says."""

    opened: ClassVar[list[object]] = []

    def __init__(self, source):
        self.opened.append(source)
        name = {0: "3.mp4", 1: "1000000000.mp4"}.get(source, Path(str(source)).name)
        # `3of5.mp4` says that it has five frames, and ends behind three.
        found = re.fullmatch(r"(\d+)(?:of(\d+))?\.mp4", name)
        self.left = int(found[1]) if found else -1
        self.breaks = name == "15.mp4"
        self.promised = float(found[2] or found[1]) if found else 0.0

    def isOpened(self):  # noqa: N802
        return self.left >= 0

    def get(self, wanted):
        assert wanted == FRAME_COUNT
        return self.promised

    def read(self):
        if self.breaks:
            raise CaptureError("OpenCV(4) error:\n (-215) in function 'read'")
        if not self.left:
            return False, None
        self.left -= 1
        return True, np.full((8, 8, 3), (10, 20, 30 + self.left % 100), dtype=np.uint8)

    def release(self):
        self.opened.remove(self.opened[-1])


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let frames be read without OpenCV."""
    monkeypatch.setitem(
        sys.modules,
        "cv2",
        types.SimpleNamespace(VideoCapture=Capture, CAP_PROP_FRAME_COUNT=FRAME_COUNT, error=CaptureError),
    )


def video(folder, name):
    (folder / name).touch()
    return folder / name
