"""infer.py writes answers as they come, so what stops it leaves those before."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cleave.deployment import CodecError, Device, ImageError, PayloadError, Pipeline, Repository, ServingError
from cleave.lightning_modules import signals
from cleave.reports.answers import Answer, Tally
from cleave.reports.answers_file import AnswersFile, check_file
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.infer import infer, run_bundle

from .inferring import Capture, bundle_and_pictures, names_of, notes, stand_in
from .serving_client import serving, until
from .training_helpers import ROOT, python_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return bundle_and_pictures(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder / "net", repository=Repository(samples=4)) as (server, _):
        yield server


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize(("ending", "asks"), [("csv", False), ("jsonl", False), ("jsonl", True)])
def test_a_bad_picture_leaves_the_answers_before_it(folder, server, tmp_path, capsys, ending, asks, size):
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures/5.png").write_bytes(b"no picture")
    file = tmp_path / f"new/answers.{ending}"
    given = [f"bundle={folder}/net", f"input={tmp_path}/pictures", f"output={file}", f"batch_size={size}"]
    given += [f"server=127.0.0.1:{server.port}"] if asks else []
    with pytest.raises(ImageError, match=r"5\.png") as raised:
        infer(compose_config("infer", given, tmp_path))
    assert names_of(file) == [f"{number}.png" for number in range(5)]
    assert f"5 answers are kept in {file}" in notes(raised)
    assert "5 images through" in capsys.readouterr().out


@pytest.mark.parametrize("asks", [False, True])
def test_a_sample_that_fails_leaves_the_others_of_its_batch(folder, server, tmp_path, monkeypatch, asks):
    kind = Device if asks else Pipeline
    run = kind.run

    def failing(self, inputs):
        raise PayloadError({1: CodecError("it is damaged")}, run(self, inputs))

    monkeypatch.setattr(kind, "run", failing)
    file = tmp_path / "answers.jsonl"
    given = [f"bundle={folder}/net", f"input={folder}/pictures", f"output={file}", "batch_size=3"]
    given += [f"server=127.0.0.1:{server.port}"] if asks else []
    with pytest.raises(PayloadError, match="it is damaged") as raised:
        infer(compose_config("infer", given, tmp_path))
    assert names_of(file) == ["0.png", "2.png"]
    assert f"2 answers are kept in {file}" in notes(raised)


def test_a_server_that_goes_away_leaves_the_answers_before(folder, tmp_path):
    file = tmp_path / "answers.jsonl"
    with serving(folder / "net", repository=Repository(samples=4)) as (server, _):
        given = [f"bundle={folder}/net", f"input={folder}/pictures", f"output={file}", "batch_size=2"]
        given += [f"server=127.0.0.1:{server.port}", "remote.in_flight=1", "remote.attempts=1"]
        found: list[list[str]] = []

        def seen(answer):
            found.append(names_of(file))  # an answer is in the file before the next is asked for
            server.close()

        with pytest.raises(ServingError) as raised:
            run_bundle(compose_config("infer", given, tmp_path), seen)
    assert found == [["0.png"], ["0.png", "1.png"]]
    assert names_of(file) == ["0.png", "1.png"]
    assert f"2 answers are kept in {file}" in notes(raised)


@pytest.fixture
def opencv(monkeypatch):
    stand_in(monkeypatch)


@pytest.fixture
def heeded():
    before = {signum: signal.getsignal(signum) for signum in signals.SIGNALS}
    signals.install()
    yield
    signals._Waiting.owner = None
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("asks", [False, True])
def test_a_camera_without_an_end_writes_until_a_signal(folder, server, tmp_path, opencv, heeded, capsys, asks, name):
    file = tmp_path / "answers.jsonl"
    given = [f"bundle={folder}/net", "input=1", "limit=null", f"output={file}", "batch_size=4"]
    given += [f"server=127.0.0.1:{server.port}"] if asks else []
    count = 0

    def seen(answer):
        nonlocal count
        count += 1
        if count == 42:
            os.kill(os.getpid(), signal.Signals[name])

    with pytest.raises(signals.Stopped) as raised:
        run_bundle(compose_config("infer", given, tmp_path), seen)
    assert names_of(file) == [f"frame {number}" for number in range(42)]
    assert notes(raised) == f"42 answers are kept in {file}"
    told = capsys.readouterr().out
    assert "42 images through" in told
    assert "until it was stopped" in told
    assert Capture.opened == []


def test_what_a_file_held_stays_until_the_first_answer(folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for ending in ("csv", "jsonl"):
        file = tmp_path / f"answers.{ending}"
        file.write_text("of old\n")
        given = [f"bundle={folder}/net", f"output={file}"]
        with pytest.raises(ImageError) as raised:
            infer(compose_config("infer", [*given, f"input={tmp_path}/broken.png"], tmp_path))
        assert file.read_text() == "of old\n"
        assert "There was no answer yet" in notes(raised)
        infer(compose_config("infer", [*given, f"input={folder}/pictures/3.png"], tmp_path))
        assert names_of(file) == ["3.png"]


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    places = [f"{tmp_path}/file/a.jsonl", f"{tmp_path}/file/below/a.csv"]
    places += ["/proc/a.jsonl", "/proc/new/a.csv"] if sys.platform == "linux" else []
    for place in places:
        with pytest.raises(OSError, match=rf"^output={re.escape(place)} cannot be written: "):
            infer(compose_config("infer", ["bundle=nowhere", "input=digits", f"output={place}"], tmp_path))
    assert check_file(f"{tmp_path}/new/folder/a.csv") == tmp_path / "new/folder/a.csv"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a disk that is always full")
def test_a_full_disk_is_one_sentence(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("/dev/full")
    with (
        AnswersFile(check_file(f"{tmp_path}/a.jsonl")) as file,
        pytest.raises(OSError, match=r"^output=.*a\.jsonl cannot be written: No space left on device"),
    ):
        file.write({"image": "0.png"})
    assert file.lines == 0


def write_many(file: AnswersFile) -> None:
    for number in range(1000):
        file.write({"image": f"{number}.png"})


def test_a_disk_that_fills_up_holds_whole_lines(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "a.jsonl"
    with AnswersFile(path) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                write_many(file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_of(path) == [f"{number}.png" for number in range(file.lines)]
    assert 900 < path.stat().st_size <= 1000


def test_of_many_answers_only_those_that_are_shown_are_held():
    rng = np.random.default_rng(0)
    tally, answers = Tally(), []
    for number in range(500):
        sent, size = (int(value) for value in rng.integers(1, 100, 2))
        label = [None, "ant", "bee"][number % 3]
        exit = [None, "early", "late"][number % 3]
        answers.append(Answer(f"{number}", "ant", label, 0.5, sent, size if number % 2 else None, exit))
        tally.add(answers[-1])
    assert tally.first == answers[: tally.shown]
    assert tally.shown < 100
    known = [each.correct for each in answers if each.correct is not None]
    assert (tally.count, tally.labelled, tally.right) == (500, len(known), sum(known))
    lengths = [each.payload_bytes for each in answers]
    assert (tally.least, tally.most, tally.mean_bytes) == (min(lengths), max(lengths), sum(lengths) / 500)
    assert dict(tally.exits) == {"early": 167, "late": 166}
    files = [each for each in answers if each.file_bytes is not None]
    assert tally.files == len(files)
    assert tally.smaller_files == sum(each.payload_bytes > each.file_bytes for each in files)
    assert tally.file_bytes == sum(each.file_bytes for each in files)


@pytest.mark.slow
def test_a_command_that_is_stopped_says_what_it_keeps(folder, server, tmp_path):
    os.mkfifo(tmp_path / "9.png")  # a picture that never comes
    for number in range(5):
        shutil.copy(folder / f"pictures/{number}.png", tmp_path)
    command = [sys.executable, str(ROOT / "scripts/infer.py"), f"bundle={folder}/net", f"input={tmp_path}"]
    command += [f"server=127.0.0.1:{server.port}", "batch_size=1", "remote.in_flight=1", f"output={tmp_path}/a.jsonl"]
    env = {**os.environ, "PYTHONPATH": python_path()}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until(lambda: (tmp_path / "a.jsonl").is_file() and len(names_of(tmp_path / "a.jsonl")) == 5)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143
    assert err == f"Stopped by SIGTERM.\n5 answers are kept in {tmp_path}/a.jsonl\n"
