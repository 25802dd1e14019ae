"""serve.py and the device client of infer.py, as a person runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from cleave.deployment import ImageError, Pipeline, Repository, ServingError, load_bundle
from cleave.deployment.runtime.frames import frames
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.infer import infer
from cleave.scripts.serve import built, serve

from .deployment_networks import exit_bundle, exit_images, images, make_bundle
from .serving_client import Caller, ask_on, outputs_of, request_of, serving, until
from .training_helpers import ROOT, python_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    make_bundle(folder / "net", "sample")
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, image in enumerate(images(5)):
        Image.fromarray(image.numpy().transpose(1, 2, 0)).save(pictures / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder / "net", repository=Repository(samples=4)) as (server, _):
        yield server


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_under_load_answers_what_was_accepted_and_ends_with_status_0(folder, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts/serve.py"),
        f"bundle={folder}/net",
        "port=0",
        "queue=200",
        "threads=1",
    ]
    env = {**os.environ, "PYTHONPATH": python_path(), "COLUMNS": "200"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        while line and "Serving net.tail (version 1)" not in line:
            line = process.stdout.readline()
        port = int(re.search(r"port (\d+)", line)[1])
        expected = Pipeline(load_bundle(folder / "net")).run(images(2))
        request = request_of("net.tail", {"payload": expected.payloads["cut"]})
        caller, answered, refused = Caller(port), [], []
        stop = threading.Event()

        with ThreadPoolExecutor(8) as pool:
            for _ in range(8):
                pool.submit(ask_on, lambda: [outputs_of(caller.infer(request))["logits"]], answered, refused, stop)
            until(lambda: len(answered) > 50)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
            until(lambda: refused)
            stop.set()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert set(refused) == {"UNAVAILABLE"}
    for logits in answered:  # a batch that others shared differs in the last bits
        torch.testing.assert_close(logits, expected.logits, atol=1e-6, rtol=1e-5)
    counts = dict(reversed(pair.split()) for pair in re.search(r"Requests: (.*)", out)[1].split(", "))
    assert int(counts["OK"].replace(",", "")) == len(answered)
    assert set(counts) <= {"OK", "UNAVAILABLE"}


def test_a_server_of_a_config_serves_and_drains(folder, tmp_path, capsys):
    given = [
        f"bundle=[{folder}/net]",
        "port=0",
        "metrics_port=0",
        "batch.samples=2",
        f"repository={folder}",
        "threads=1",
    ]
    asked = iter([False, True])
    threads = torch.get_num_threads()
    assert serve(compose_config("serve", given, tmp_path), asked=lambda: next(asked))
    told = capsys.readouterr().out
    assert "Serving net.tail (version 1) on 127.0.0.1 port " in told
    assert "Metrics: http://127.0.0.1:" in told
    assert "Requests: none" in told
    assert torch.get_num_threads() == threads == 1


def test_what_cannot_be_served_is_one_sentence(folder, server, tmp_path):
    for given, words in (
        (["bundle=null"], "bundle=null without a repository"),
        ([f"bundle={tmp_path}"], "is no bundle"),
        ([f"bundle={folder}/net", "placement=edge"], "no placement 'edge'; it has device, server"),
        ([f"bundle={folder}/net", f"port={server.port}"], "the port is in use"),
        ([f"bundle={folder}/net", "listen=0.0.0.0"], "insecure=true"),
        ([f"bundle={folder}/net", "certificate=a.pem"], "without a key"),
        ([f"bundle={folder}/net", "token=nowhere"], "token=nowhere is no file"),
        ([f"bundle={folder}/net", "grace=0"], "grace must be a positive number"),
        ([f"bundle={folder}/net", "workers=1000"], "workers=1000 of threads=1 each would share"),
        ([f"bundle={folder}/net", "threads=1000"], "workers=1 of threads=1000 each would share"),
        ([f"bundle={folder}/net", "batch.wait_ms=-1"], "batch.wait_ms must be"),
        ([f"bundle={folder}/net", "batch.samples=0"], "samples must be"),
        ([f"bundle={folder}/net", "repository=nowhere"], "repository=nowhere is no folder"),
        ([f"bundle={folder}/net", "onward.token=x"], r"onward\.token=x would be ignored: onward\.servers names none"),
        ([f"bundle={folder}/net", "onward.servers={cloud: here}"], "onward to cloud: here must be HOST:PORT"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            built(compose_config("serve", ["port=0", *given], tmp_path))


# --- the client -------------------------------------------------------------------------------------------------------


def asking(folder, tmp_path, server, *more):
    given = [f"bundle={folder}/net", f"server=127.0.0.1:{server.port}", "batch_size=2", *more]
    return infer(compose_config("infer", given, tmp_path))


def test_infer_asks_a_server_and_writes_lines(folder, server, tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    found = asking(folder, tmp_path, server, f"input={folder}/pictures", f"output={file}")
    local = infer(compose_config("infer", [f"bundle={folder}/net", f"input={folder}/pictures"], tmp_path))
    assert found == local
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["image"] for line in lines] == [f"{number}.png" for number in range(5)]
    assert [line["class"] for line in lines] == local
    assert all(line["attempts"] == 1 and line["flag"] == "" and line["bytes"] > 0 for line in lines)
    told = capsys.readouterr().out
    assert "5 of 5 images went to the server, 0 of them more than once" in told
    assert "ms there and back" in told


def test_infer_answers_by_its_exit_where_nobody_answers(tmp_path, capsys):
    exit_bundle(tmp_path / "early", placements=("device", "server", "server"), split="layer1")
    for number, image in enumerate(exit_images(3)):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{number}.png")
    given = [f"bundle={tmp_path}/early", f"input={tmp_path}", "remote.attempts=1", "server=127.0.0.1:1"]
    assert len(infer(compose_config("infer", [*given, "remote.fallback=exit"], tmp_path))) == 3
    assert "3 were answered here instead, by the fallback `exit`" in capsys.readouterr().out
    with pytest.raises(ServingError, match=r"127\.0\.0\.1:1"):
        infer(compose_config("infer", given, tmp_path))


def test_settings_of_a_client_that_mean_nothing_are_refused(folder, server, tmp_path):
    given = [f"bundle={folder}/net", f"input={folder}/pictures"]
    with pytest.raises(ValueError, match=r"remote\.fallback=exit would be ignored: server=HOST:PORT names no server"):
        infer(compose_config("infer", [*given, "remote.fallback=exit"], tmp_path))
    for more, words in (
        (["exits.policy_file=x.json"], "both sides need the same policy"),
        ([f"output={tmp_path}/a.csv"], "must end in .jsonl with a server"),
        (["remote.timeout=0"], "timeout must be"),
        (["remote.local=x"], "is not a folder"),
        (["remote.certificate=x"], "without a key"),
        (["limit=0"], "limit must be"),
        (["bits=1"], "bits must be"),
    ):
        with pytest.raises(ValueError, match=words):
            asking(folder, tmp_path, server, f"input={folder}/pictures", *more)


def test_a_picture_that_is_none_is_named(folder, server, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="broken.png"):
        asking(folder, tmp_path, server, f"input={tmp_path}")


# --- videos -----------------------------------------------------------------------------------------------------------


FRAME_COUNT = 7  # as OpenCV calls it by number


class Capture:
    """A stand-in for OpenCV's reader: as many frames as the name says."""

    opened: ClassVar[list[object]] = []

    def __init__(self, source):
        self.opened.append(source)
        name = "3.mp4" if source == 0 else str(source)
        # `3of5.mp4` says that it has five frames, and ends behind three.
        found = re.fullmatch(r"(\d+)(?:of(\d+))?\.mp4", name)
        self.left = int(found[1]) if found else -1
        self.promised = float(found[2] or found[1]) if found else 0.0

    def isOpened(self):  # noqa: N802
        return self.left >= 0

    def get(self, wanted):
        assert wanted == FRAME_COUNT
        return self.promised

    def read(self):
        if not self.left:
            return False, None
        self.left -= 1
        return True, np.full((8, 8, 3), (10, 20, 30 + self.left), dtype=np.uint8)

    def release(self):
        self.opened.remove(self.opened[-1])


@pytest.fixture
def opencv(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "cv2", types.SimpleNamespace(VideoCapture=Capture, CAP_PROP_FRAME_COUNT=FRAME_COUNT)
    )


def test_frames_of_a_video_and_of_a_camera_are_pictures(folder, server, tmp_path, opencv):
    assert next(frames("7.mp4")).getpixel((0, 0)) == (36, 20, 10)  # OpenCV has blue first
    assert len(list(frames("7.mp4"))) == 7
    assert len(list(frames(0, limit=2))) == 2
    assert len(asking(folder, tmp_path, server, "input=5.mp4")) == 5
    assert len(infer(compose_config("infer", [f"bundle={folder}/net", "input=0", "limit=2"], tmp_path))) == 2
    assert Capture.opened == []


def test_a_video_without_frames_and_one_that_is_none_are_named(folder, tmp_path, opencv):
    with pytest.raises(ImageError, match=r"the video 0\.mp4 has no frame"):
        list(frames("0.mp4"))
    for source, words in (("x.mp4", "the video x.mp4 cannot be opened"), (5, "the camera 5 cannot be opened")):
        with pytest.raises(ImageError, match=words):
            infer(compose_config("infer", [f"bundle={folder}/net", f"input={source}"], tmp_path))


def test_a_video_that_is_cut_off_is_named_behind_its_last_frame(folder, server, tmp_path, opencv):
    seen: list[str] = []
    words = r"the video 3of5\.mp4 ends after 3 of its 5 frames: it is cut off; limit=3 takes these"
    with pytest.raises(ImageError, match=words):
        seen.extend(map(str, frames("3of5.mp4")))
    assert len(seen) == len(list(frames("3of5.mp4", limit=3))) == 3
    assert len(list(frames("3of5.mp4", limit=2))) == 2
    assert len(list(frames("98of100.mp4"))) == 98  # an estimate that is a little off
    with pytest.raises(ImageError, match="97 of its 100"):
        list(frames("97of100.mp4"))
    with pytest.raises(ImageError, match=words):
        asking(folder, tmp_path, server, "input=3of5.mp4", "limit=4")
    assert Capture.opened == []


def test_frames_need_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="the extra `video`: pip install opencv-python-headless"):
        next(frames("1.mp4"))
