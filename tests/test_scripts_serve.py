"""serve.py, as a person runs it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch

from cleave.deployment import Pipeline, Repository, load_bundle
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.given.texts import naming
from cleave.scripts.assembly.given.value_types import check_values
from cleave.scripts.assembly.inferring.asking import device_of
from cleave.scripts.assembly.starting.terminal import CONF
from cleave.scripts.serve import built, onward, serve

from .deployment_networks import images, make_bundle
from .serving_client import Caller, ask_on, outputs_of, request_of, serving, until
from .training_helpers import ROOT, python_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    make_bundle(folder / "net", "sample")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder / "net", repository=Repository(samples=4)) as (server, _):
        yield server


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sigterm_under_load_answers_what_was_accepted_and_ends_with_status_0(folder, tmp_path, closed):
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
            if closed:  # as `| head` does once it has enough
                process.stdout.close()
                process.stdout = None
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
    assert err == ""
    if closed:
        return
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


@pytest.mark.parametrize("unread", ["closed", pytest.param("full", marks=pytest.mark.slow)])
def test_a_server_whose_output_nobody_reads_serves_and_drains(folder, tmp_path, unread):
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts/serve.py"), f"bundle={folder}/net", f"port={port}", "threads=1"]
    env = {**os.environ, "PYTHONPATH": python_path()}
    if unread == "closed":
        reader, out = os.pipe()
        os.close(reader)
    else:
        out = os.open("/dev/full", os.O_WRONLY)
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=subprocess.PIPE, text=True)
    os.close(out)
    try:
        caller = Caller(port)
        until(lambda: process.poll() is not None or is_ready(caller))
        assert process.poll() is None
        payloads = Pipeline(load_bundle(folder / "net")).run(images(2)).payloads["cut"]
        assert len(outputs_of(caller.infer(request_of("net.tail", {"payload": payloads})))["logits"]) == 2
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (0, "")


def is_ready(caller: Caller) -> bool:
    try:
        return caller("ServerReady", timeout=1.0).ready
    except grpc.RpcError:
        return False


@pytest.mark.parametrize("given", [[], ["metrics_listen=::1"]])
def test_metrics_listen_on_this_machine_alone_whoever_may_ask(folder, tmp_path, capsys, given):
    if given and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    more = [f"bundle={folder}/net", "port=0", "metrics_port=0", "listen=0.0.0.0", "insecure=true", "threads=1", *given]
    read: list[str] = []

    def asked() -> bool:
        address = re.search(r"Metrics: (http://\S+)", capsys.readouterr().out)[1]
        assert re.fullmatch(r"http://(127\.0\.0\.1|\[::1\]):\d+/metrics", address)
        with urllib.request.urlopen(address) as answer:
            read.append(answer.read().decode())
        return True

    assert serve(compose_config("serve", more, tmp_path), asked)
    assert "cleave_queue_requests" in read[0]


def has_ipv6() -> bool:
    try:
        with contextlib.closing(socket.socket(socket.AF_INET6)) as tried:
            tried.bind(("::1", 0))
    except OSError:
        return False
    return True


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
        ([f"bundle={folder}/net", "repository=nowhere"], "repository=nowhere is no folder"),
        ([f"bundle={folder}/net", "onward.token=x"], r"onward\.token=x would be ignored: onward\.servers names none"),
        ([f"bundle={folder}/net", "onward.servers={cloud: 'a:1'}"], r"onward\.servers\.cloud=a:1 is of no placement"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            built(compose_config("serve", ["port=0", *given], tmp_path))


def test_every_setting_is_checked_before_a_bundle_is_loaded(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Repository, "add", lambda *_: pytest.fail("a bundle was loaded"))
    (tmp_path / "short").write_text("word")
    taken = server.port
    for given, words in (
        ("queue=-1", "queue must be"),
        ("workers=0", "workers must be"),
        ("streams=0", "streams must be"),
        ("batch.samples=0", r"batch\.samples must be"),
        ("batch.wait_ms=-1", r"batch\.wait_ms must be"),
        ("batch.wait_ms=60001", r"batch\.wait_ms must be"),
        ("message_bytes=-5", "message_bytes must be"),
        ("port=99999", "port must be"),
        ("port=null", "port must be"),
        (f"port={taken}", f"cannot listen on 127.0.0.1:{taken}: the port is in use"),
        ("metrics_port=99999", "metrics_port must be"),
        (f"metrics_port={taken}", f"cannot listen on 127.0.0.1:{taken}: the port is in use"),
        ("port=8001 metrics_port=8001", "port=8001 and metrics_port=8001 are one port"),
        ("metrics_port=0 metrics_listen=null", "metrics_listen must be a host's name or address, got null"),
        ("metrics_port=0 metrics_listen=a:1", "metrics_listen must be"),
        ("metrics_listen=0.0.0.0", r"metrics_listen=0\.0\.0\.0 would be ignored: metrics_port=null"),
        ("listen=null", "listen must be a host's name or address, got null"),
        ("listen=", "listen must be a host's name or address, got nothing"),
        ("listen=127.0.0.1:80", "listen must be"),
        ("token=true", "token must be a file or null, got true"),
        (f"token={tmp_path}/short", "token=.*short must hold one word"),
        ("authorities=nowhere", "authorities=nowhere is no file"),
        ("placement=1", "placement must be a placement's name or null, got 1"),
        ("repository=true", "repository must be"),
        ("device=null", "device must be"),
        ("threads=0", "threads must be"),
        ("grace=-1", "grace must be"),
        ("bundle=true", "bundle must be a bundle's folder, or a list of them, got true"),
        ("bundle=[a,null]", r"bundle must be .*, got \['a', None\]"),
        ("bundle=[]", r"bundle=\[\] without a repository"),
        ("onward.servers=abc", r"onward\.servers must name placements, .*, got abc"),
        ("onward.servers=[a]", r"onward\.servers must name placements, .*, got \['a'\]"),
        ("onward.servers=5", r"onward\.servers must name placements, .*, got 5"),
        ("onward.servers={cloud: null}", r"onward\.servers\.cloud must be HOST:PORT, got null"),
        ("onward.servers={cloud: here}", r"onward\.servers\.cloud=here must be HOST:PORT"),
        ("onward.servers={cloud: 'a:1'} onward.timeout=0", r"onward\.timeout must be"),
        ("onward.servers={cloud: 'a:1'} onward.attempts=0", r"onward\.attempts must be"),
        ("onward.servers={cloud: 'a:1'} onward.key=x", r"onward\.key=x is given without a certificate"),
        ("onward.servers={cloud: 'a:1'} onward.token=false", r"onward\.token must be a file or null, got false"),
        (f"onward.servers={{cloud: 'a:1'}} onward.token={tmp_path}/short", r"onward\.token=.* must hold one word"),
    ):
        words_given = re.split(r" (?=[\w.]+=)", given)
        cfg = compose_config("serve", ["bundle=nowhere", "port=0", *words_given], tmp_path)
        with pytest.raises((ValueError, OSError), match=f"^{words}"):
            built(cfg)


def test_settings_of_servers_behind_this_one_mean_nothing_without_them(tmp_path):
    whole = compose_config("serve", ["bundle=nowhere"], tmp_path)
    keys = [key for key in whole.onward if key != "servers"]
    assert len(keys) == 7
    for key in keys:
        other = {bool: "true", float: "7.0", int: "7"}.get(type(whole.onward[key]), "x")
        for servers in ("null", "{}"):
            given = ["bundle=nowhere", "port=0", f"onward.servers={servers}", f"onward.{key}={other}"]
            with pytest.raises(
                ValueError, match=rf"^onward\.{key}={other} would be ignored: onward\.servers names none"
            ):
                built(compose_config("serve", given, tmp_path))


@pytest.mark.parametrize("name", ["serve", "infer"])
def test_durations_may_be_fractions_and_null_is_no_number(tmp_path, name):
    durations = {"serve": ["batch.wait_ms", "grace", "onward.timeout"], "infer": ["remote.timeout"]}[name]
    for key in durations:
        check_values(compose_config(name, ["bundle=x", f"{key}=0.5", *given_to(name)], tmp_path), CONF)
    others = {"serve": ["port", "streams", "batch.samples", "queue"], "infer": ["batch_size", "remote.attempts"]}[name]
    for key in [*durations, *others]:
        for value, got in (("null", "None"), ("many", "'many'")):
            with pytest.raises(TypeError, match=rf"^{re.escape(key)} must be a (whole )?number, got {got}"):
                check_values(compose_config(name, ["bundle=x", f"{key}={value}", *given_to(name)], tmp_path), CONF)
    if name == "infer":
        check_values(compose_config(name, ["bundle=x", "limit=null", *given_to(name)], tmp_path), CONF)


def given_to(name: str) -> list[str]:
    return ["input=x"] if name == "infer" else []


@pytest.mark.parametrize("name", ["serve", "infer"])
def test_a_token_goes_to_others_in_the_clear_only_where_that_is_said(folder, tmp_path, name):
    (tmp_path / "token").write_text("0123456789abcdef")
    group = {"serve": "onward", "infer": "remote"}[name]
    given = [f"bundle={folder}/net", f"{group}.token={tmp_path}/token", *given_to(name)]
    given += ["onward.servers={server: 'example.org:1'}"] if name == "serve" else ["server=example.org:1"]
    make = onward if name == "serve" else device_of
    words = rf"^{group}\.token=\S+ would go to example\.org .* {group}\.authorities=FILE.* {group}\.insecure=true"
    with pytest.raises(ValueError, match=words):
        make(compose_config(name, given, tmp_path))
    with contextlib.closing(make(compose_config(name, [*given, f"{group}.insecure=true"], tmp_path))):
        pass


def test_errors_name_the_settings_and_leave_all_else():
    for said, words in (
        ("timeout must be", "remote.timeout must be"),
        ("key=x is given without a certificate", "remote.key=x is given without a certificate"),
        ("token=/a/key=b is short; set key=FILE", "remote.token=/a/key=b is short; set remote.key=FILE"),
        ("a/key=1 timeout is no folder", "a/key=1 timeout is no folder"),
        ("keys are wrong", "keys are wrong"),
    ):
        names = {key: f"remote.{key}" for key in ("timeout", "key", "token")}
        with pytest.raises(ValueError, match=f"^{words}$"), naming(names):
            raise ValueError(said)
    with pytest.raises(ValueError, match="^timeout$"), naming({}):
        raise ValueError("timeout")
