"""serve.py, as a person runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from cleave.deployment import Pipeline, Repository, load_bundle
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.serve import built, serve

from .deployment_networks import images, make_bundle
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
