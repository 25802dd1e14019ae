"""Frames of a video file or a camera."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from .preprocess import MAX_PIXELS, ImageError

VIDEO_ENDINGS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
LAST_CAMERA = 2**31 - 1  # OpenCV takes no larger index


def check_opencv() -> None:
    """Raise :class:`ImportError` unless OpenCV is installed, which reads frames."""
    _opencv()


def frames(source: str | Path | int, limit: int | None = None) -> Iterator[Image.Image]:
    """Yield the frames of a video file, or of the camera of an index, as RGB pictures.

    Args:
        source: The file, or the index.
        limit: Most frames; ``None``: all.

    Raises:
        ImportError: OpenCV is not installed.
        ImageError: It cannot be opened, or has no frame that can be read; or, behind the last one that can be, it is a
            file that says that it has more.
    """
    cv2 = _opencv()
    what = f"the camera {source}" if isinstance(source, int) else f"the video {source}"
    if isinstance(source, int) and not 0 <= source <= LAST_CAMERA:
        raise ImageError(f"{what} cannot be opened: its index must be 0 to {LAST_CAMERA}")
    try:
        yield from _read(cv2, source, what, limit)
    except cv2.error as error:
        raise ImageError(f"{what} cannot be read: {' '.join(str(error).split())}") from error


def _read(cv2: Any, source: str | Path | int, what: str, limit: int | None) -> Iterator[Image.Image]:
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    try:
        if not capture.isOpened():
            raise ImageError(f"{what} cannot be opened")
        count = 0
        while limit is None or count < limit:
            right, pixels = capture.read()
            if not right:
                break
            if pixels.shape[0] * pixels.shape[1] > MAX_PIXELS:
                raise ImageError(f"{what} has frames of more than {MAX_PIXELS} pixels")
            count += 1
            yield Image.fromarray(pixels[:, :, ::-1].copy())
        if not count:
            raise ImageError(f"{what} has no frame that can be read")
        # A camera knows no number of frames, and other streams say 0 or less; some files only estimate theirs.
        promised = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if not isinstance(source, int) else 0
        if count != limit and count + promised // 50 < promised:
            raise ImageError(
                f"{what} ends after {count} of its {promised} frames: it is cut off; limit={count} takes these"
            )
    finally:
        capture.release()


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError("frames need the extra `video`: pip install opencv-python-headless") from error
    return cv2
