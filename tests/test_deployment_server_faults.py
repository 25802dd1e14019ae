"""Faults: whatever happens, each request is answered once and rightly, or fails with a status that says why."""

from __future__ import annotations

import collections
import contextlib
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from cleave.deployment import Pipeline, Repository, Server, load_bundle

from .deployment_networks import images, make_bundle
from .serving_client import Caller, outputs_of, request_of, serving, until
from .training_helpers import ROOT, python_path

MAY = {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "NOT_FOUND", "CANCELLED"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "net"
    make_bundle(folder, "sample")
    return load_bundle(folder)


def known(bundle, count=16):
    """Requests of one image each, and what they are answered."""
    pipeline, found = Pipeline(bundle), []
    for number in range(count):
        expected = pipeline.run(images(1, seed=number))
        found.append((request_of("net.tail", {"payload": expected.payloads["cut"]}), expected.logits))
    return found


def right(answer, logits):
    """The logits of this request and of no other; a batch that others shared differs in the last bits."""
    torch.testing.assert_close(outputs_of(answer)["logits"], logits, atol=1e-5, rtol=1e-5)


def storm(caller, requests, count, late=0.0, events=()):
    """Ask from several threads; return how often each status came. Events happen one after another, evenly spread."""
    chance, counts, lock = random.Random(0), collections.Counter(), threading.Lock()
    happening, coming, every = threading.Lock(), iter(events), count // (len(events) + 1)
    plan = [(chance.randrange(len(requests)), chance.random() < late) for _ in range(count)]

    def ask(number):
        index, is_late = plan[number]
        if number and number % every == 0:
            with happening:
                next(coming, bool)()
        try:
            right(caller.infer(requests[index][0], timeout=0.0005 if is_late else 60), requests[index][1])
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name
        with lock:
            counts[code] += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(count)))  # an answer that is wrong is raised here
    assert sum(counts.values()) == count
    assert counts.keys() <= MAY, counts
    return counts


def test_requests_past_their_deadline_take_nothing_from_the_others(bundle):
    with serving(bundle.directory) as (server, caller):
        counts = storm(caller, known(bundle), 200, late=0.2)
        assert counts["OK"] >= 130
        assert counts["DEADLINE_EXCEEDED"] > 0
        until(lambda: server._handlers.idle(0) and not server._batcher.waiting)


def test_a_queue_that_is_full_refuses_and_answers_those_it_took(bundle):
    with serving(bundle.directory, queue=1) as (server, caller):
        counts = storm(caller, known(bundle), 150)
        assert counts.keys() <= {"OK", "RESOURCE_EXHAUSTED"}
        assert server.metrics.counts().get("OK") == counts["OK"] > 0


def test_a_bundle_that_goes_and_comes_back(bundle, tmp_path):
    repository = Repository(folder=bundle.directory.parent)
    with serving(bundle.directory, repository=repository) as (_, caller):

        def reload():
            repository.unload("net")
            repository.load("net")

        counts = storm(caller, known(bundle), 150, events=[reload] * 3)
        assert counts.keys() <= {"OK", "NOT_FOUND"}
        assert counts["OK"] > 0
        assert caller.status(known(bundle, 1)[0][0]) == ("OK", "")


def test_a_server_that_is_killed_and_comes_back_answers_each_request_once(bundle):
    repository = Repository()
    repository.add(bundle.directory)
    servers = [Server(repository, port=0).start()]
    caller, port = Caller(servers[0].port), servers[0].port

    def close():
        servers[-1].close()

    def start():
        servers.append(Server(repository, port=port).start())

    try:
        counts = storm(caller, known(bundle), 250, events=[close, start])
        assert counts.keys() <= {"OK", "UNAVAILABLE", "CANCELLED"}
        assert counts["OK"] >= 40
        until(lambda: caller.status(known(bundle, 1)[0][0])[0] == "OK")
    finally:
        for server in servers:
            server.close()
        caller.channel.close()


def test_connections_that_say_nothing_or_nonsense_hold_nobody_up(bundle):
    with contextlib.ExitStack() as silent, serving(bundle.directory) as (server, caller):
        address = ("127.0.0.1", server.port)
        for content in (b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\xff", b"\xff" * 10_000):
            connection = silent.enter_context(socket.create_connection(address, timeout=30))
            connection.sendall(content)
            with contextlib.suppress(OSError):  # what is nonsense is hung up on
                connection.shutdown(socket.SHUT_WR)  # half closed: it sends no more, and reads nothing
        assert storm(caller, known(bundle), 100) == {"OK": 100}


def test_an_interrupted_stream_is_asked_again_for_what_had_no_answer(bundle):
    requests = known(bundle)
    wanted = {str(number): requests[number % len(requests)] for number in range(120)}
    answers: dict[str, torch.Tensor] = {}
    repository = Repository()
    repository.add(bundle.directory)
    server = Server(repository, port=0).start()
    port, caller, times, codes = server.port, Caller(server.port), 0, set()
    try:
        while len(answers) < len(wanted):
            left = []
            for name in wanted.keys() - answers.keys():
                request = type(requests[0][0])()
                request.CopyFrom(wanted[name][0])
                request.id = name
                left.append(request)
            try:
                for answer in caller.stub("ModelStreamInfer")(iter(left), timeout=60, wait_for_ready=True):
                    name = answer.infer_response.id
                    if answer.error_message:
                        continue
                    assert name not in answers, "answered twice"
                    right(answer.infer_response, wanted[name][1])
                    answers[name] = outputs_of(answer.infer_response)["logits"]
                    if len(answers) in (30, 70) and times < 2:
                        times += 1
                        server.close()
                        server = Server(repository, port=port).start()
            except grpc.RpcError as error:
                codes.add(error.code().name)
        assert times == 2
        assert codes <= MAY
    finally:
        server.close()
        caller.channel.close()


SERVER = """
import sys, torch
from cleave.deployment import Repository, Server
torch.set_num_threads(1)
repository = Repository(folder=sys.argv[1])
repository.add(sys.argv[1] + "/net")
with Server(repository, port=int(sys.argv[2]), queue=6) as server:
    print(server.port, flush=True)
    server.wait()
"""


class Killed:
    """A server in a process of its own, which can be killed and comes back on its port."""

    def __init__(self, folder):
        self.folder, self.port = str(folder), 0
        self.away = threading.Event()
        self.start()

    def start(self):
        command = [sys.executable, "-c", SERVER, self.folder, str(self.port)]
        env = {"PYTHONPATH": python_path(), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())
        self.away.clear()

    def kill(self):
        self.away.set()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def streamed(caller, requests, first, count, note, stalls):
    """Ask in one stream, and note what became of each; who stalls reads nothing until all is sent that can be."""
    due = {str(number): requests[number % len(requests)] for number in range(first, first + count)}

    def asked():
        for name, (request, _) in list(due.items()):
            named = type(request)()
            named.CopyFrom(request)
            named.id = name
            yield named

    code = "OK"
    try:
        call = caller.stub("ModelStreamInfer")(asked(), timeout=60)
        time.sleep(0.5 if stalls else 0)
        for answer in call:
            name = answer.infer_response.id
            if answer.error_message:
                note(int(name), answer.infer_response.parameters["status"].string_param)
            else:
                right(answer.infer_response, due[name][1])
                note(int(name), "OK")
            del due[name]  # a second answer is a KeyError
    except grpc.RpcError as error:
        code = error.code().name
    assert code != "OK" or not due, f"the stream ended without {sorted(due)}"
    for name in due:
        note(int(name), code)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_through_all_faults_at_once(bundle):
    requests, count, chance = known(bundle, 64), 10_000, random.Random(5)
    logits = torch.cat([each for _, each in requests])
    apart = (logits[:, None] - logits[None]).abs().amax(2) + torch.eye(len(logits))
    assert apart.min() > 1e-4  # an answer to another request is seen
    outcomes = collections.defaultdict(list)
    lock, done = threading.Lock(), threading.Event()
    server = Killed(bundle.directory.parent)
    caller = Caller(server.port)

    def note(number, code):
        with lock:
            outcomes[number].append(code)

    def one(number, late):
        request, expected = requests[number % len(requests)]
        try:
            right(caller.infer(request, timeout=0.0005 if late else 60), expected)
            note(number, "OK")
        except grpc.RpcError as error:
            note(number, error.code().name)

    def faults():
        for number in range(10**6):
            if done.wait(1.0):
                return
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port)) as half:
                half.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0")
                half.shutdown(socket.SHUT_WR)
            for method in ("RepositoryModelUnload", "RepositoryModelLoad") if number % 3 == 1 else ():
                with contextlib.suppress(grpc.RpcError):
                    caller(method, model_name="net")
            if number in (3, 9):
                server.kill()
                server.start()

    thread = threading.Thread(target=faults)
    thread.start()
    try:
        with ThreadPoolExecutor(12) as pool:
            waiting, number = [], 0
            while number < count:
                if chance.random() < 0.02:
                    waiting.append(pool.submit(streamed, caller, requests, number, 20, note, chance.random() < 0.3))
                    number += 20
                else:
                    waiting.append(pool.submit(one, number, chance.random() < 0.2))
                    number += 1
                # While the server is away all fail at once, so few are asked then.
                time.sleep(0.5 if server.away.is_set() else 0.002)
            for each in waiting:
                each.result()  # an answer that is wrong, or came twice, is raised here
    finally:
        done.set()
        thread.join()
        server.kill()
        caller.channel.close()
    assert sorted(outcomes) == list(range(len(outcomes)))
    assert len(outcomes) >= count
    assert {len(each) for each in outcomes.values()} == {1}
    codes = collections.Counter(each[0] for each in outcomes.values())
    print(dict(codes))
    assert codes.keys() <= MAY, codes
    assert codes["OK"] > count / 4, codes
    assert min(codes[name] for name in ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "NOT_FOUND", "UNAVAILABLE")) > 0
