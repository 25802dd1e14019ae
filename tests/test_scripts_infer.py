"""infer.py: who asks a server, and frames of videos."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from cleave.deployment import BundleError, ImageError, Repository, ServingError, build_policy
from cleave.deployment.runtime.frames import frames
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.infer import infer

from .deployment_networks import exit_bundle, exit_images
from .inferring import Capture, bundle_and_pictures, names_of, notes, stand_in, video
from .serving_client import serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return bundle_and_pictures(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder / "net", repository=Repository(samples=4)) as (server, _):
        yield server


@pytest.fixture
def opencv(monkeypatch):
    stand_in(monkeypatch)


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


def test_another_bundle_on_the_server_is_told_though_all_images_leave_here(tmp_path):
    for name, threshold in (("early", 0.0), ("other", 0.9)):
        policy = build_policy("confidence", threshold, exits=3)
        exit_bundle(tmp_path / name, policy, placements=("device", "server", "server"), split="layer1")
    for number, image in enumerate(exit_images(3)):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{number}.png")
    given = [f"bundle={tmp_path}/early", f"input={tmp_path}", "remote.name=other"]
    with serving(tmp_path / "other") as (server, _):
        for more in ([], ["remote.fallback=exit"]):
            overrides = [*given, *more, f"server=127.0.0.1:{server.port}"]
            with pytest.raises(BundleError, match="is of the bundle .*, this side has .*; give both sides the same"):
                infer(compose_config("infer", overrides, tmp_path))
    with serving(tmp_path / "early") as (server, _):
        infer(compose_config("infer", [*given[:2], f"server=127.0.0.1:{server.port}"], tmp_path))
        assert not server.metrics.counts()  # nobody was sent


def test_settings_of_a_client_that_mean_nothing_are_refused(folder, server, tmp_path):
    given = [f"bundle={folder}/net", f"input={folder}/pictures"]
    whole = compose_config("infer", given, tmp_path)
    for key, value in whole.remote.items():
        other = {bool: "true", float: "7.0", int: "7"}.get(type(value), "exit")
        with pytest.raises(ValueError, match=rf"remote\.{key}={other} would be ignored: server=HOST:PORT names no"):
            infer(compose_config("infer", [*given, f"remote.{key}={other}"], tmp_path))
    (tmp_path / "short").write_text("word")
    for more, words in (
        (["exits.policy_file=x.json"], "both sides need the same policy"),
        ([f"output={tmp_path}/a.csv"], "must end in .jsonl with a server"),
        (["remote.timeout=0"], r"^remote\.timeout must be"),
        (["remote.attempts=0"], r"^remote\.attempts must be"),
        (["remote.in_flight=0"], r"^remote\.in_flight must be"),
        (["remote.fallback=none"], r"^remote\.fallback must be"),
        (["remote.fallback=local"], r"^remote\.fallback=local with no local bundle"),
        (["remote.local=x"], "is not a folder"),
        (["remote.certificate=x"], r"^remote\.certificate=x is given without a key"),
        (["remote.authorities=x"], r"^remote\.authorities=x is no file"),
        (["remote.token=true"], r"^remote\.token must be a file or null, got true"),
        ([f"remote.token={tmp_path}/short"], r"^remote\.token=.*short must hold one word"),
        (["remote.name="], r"^remote\.name must be .* got nothing"),
        (["remote.name=5"], r"^remote\.name must be .* got 5; quote"),
        (["server=true"], r"^server must be HOST:PORT or null, got true"),
        (["server=here"], r"^server=here must be HOST:PORT"),
        (["limit=0"], "limit must be"),
        (["bits=1"], "^bits must be"),
    ):
        with pytest.raises(ValueError, match=words):
            asking(folder, tmp_path, server, f"input={folder}/pictures", *more)


def test_what_names_no_images_is_told_before_a_bundle_is_loaded(tmp_path, opencv):
    for given, words in (
        ("null", "got null"),
        ("true", "got true"),
        ("-1", "got -1"),
        ("1.5", "got 1.5"),
        ("", "got nothing"),
        ("[a]", r"got \['a'\]"),
        ("99999999999999", "index of a camera, 0 to 2147483647, got 99999999999999"),
        ("nowhere", "is neither an image"),
        ("nowhere.mp4", "is no file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"^input.*{words}"):
            infer(compose_config("infer", ["bundle=nowhere", f"input={given}"], tmp_path))
    for given, words in (
        (["bundle=null"], "bundle must be a bundle's folder, got null"),
        (["bundle=[]"], r"bundle must be a bundle's folder, got \[\]"),
        (["device=1"], "device must be a device of torch, such as cpu, got 1"),
        (["exits.policy_file=true"], r"exits\.policy_file must be a file or null, got true"),
    ):
        with pytest.raises(ValueError, match=words):
            infer(compose_config("infer", ["bundle=x", "input=digits", *given], tmp_path))


def test_a_picture_that_is_none_is_named(folder, server, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="broken.png"):
        asking(folder, tmp_path, server, f"input={tmp_path}")


# --- videos -----------------------------------------------------------------------------------------------------------


def test_frames_of_a_video_and_of_a_camera_are_pictures(folder, server, tmp_path, opencv):
    assert next(frames("7.mp4")).getpixel((0, 0)) == (36, 20, 10)  # OpenCV has blue first
    assert len(list(frames("7.mp4"))) == 7
    assert len(list(frames(0, limit=2))) == 2
    assert len(asking(folder, tmp_path, server, f"input={video(tmp_path, '5.mp4')}")) == 5
    assert len(infer(compose_config("infer", [f"bundle={folder}/net", "input=0", "limit=2"], tmp_path))) == 2
    assert Capture.opened == []


def test_a_video_without_frames_and_one_that_is_none_are_named(folder, tmp_path, opencv):
    with pytest.raises(ImageError, match=r"the video 0\.mp4 has no frame"):
        list(frames("0.mp4"))
    for source, words in (
        (video(tmp_path, "x.mp4"), r"the video .*/x\.mp4 cannot be opened"),
        (5, "the camera 5 cannot be opened"),
    ):
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
    for more, file in (([], "a.csv"), ([], "a.jsonl"), ([f"server=127.0.0.1:{server.port}"], "b.jsonl")):
        given = [f"bundle={folder}/net", f"input={video(tmp_path, '3of5.mp4')}", "batch_size=2", "limit=4"]
        with pytest.raises(ImageError, match="it is cut off; limit=3 takes these") as raised:
            infer(compose_config("infer", [*given, f"output={tmp_path}/{file}", *more], tmp_path))
        assert names_of(tmp_path / file) == ["frame 0", "frame 1", "frame 2"]
        assert f"3 answers are kept in {tmp_path}/{file}" in notes(raised)
    assert Capture.opened == []


def test_what_opencv_raises_is_an_error_of_the_video(opencv):
    with pytest.raises(ImageError, match=r"the video 15\.mp4 cannot be read: OpenCV\(4\) error: \(-215\) in function"):
        list(frames("15.mp4"))
    for index in (-1, 2**31):
        with pytest.raises(ImageError, match=f"the camera {index} cannot be opened: its index must be 0 to"):
            list(frames(index))


def test_frames_need_their_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cv2", None)
    words = "the extra `video`: pip install opencv-python-headless"
    with pytest.raises(ImportError, match=words):
        next(frames("1.mp4"))
    for given in ("1", "1.mp4"):  # before the bundle is looked for
        with pytest.raises(ImportError, match=words):
            infer(compose_config("infer", ["bundle=nowhere", f"input={given}"], tmp_path))
