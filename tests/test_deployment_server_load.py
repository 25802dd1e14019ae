"""A server under load: batches, a bounded queue, deadlines, cancelled work, clients that stall, and a gentle end."""

from __future__ import annotations

import gc
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from cleave.deployment import Pipeline, Repository, Server, Trust, load_bundle
from cleave.deployment.runtime.serving.batching import Batcher, Job, checked_threads

from .deployment_networks import images, make_bundle
from .serving_client import Gate, ask_on, outputs_of, request_of, serving, until


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "net"
    make_bundle(folder, "sample")
    return load_bundle(folder)


def asking(bundle, count=1, bits=None, **parameters):
    payloads = Pipeline(bundle, bits=bits).run(images(count)).payloads["cut"]
    return request_of("net.tail", {"payload": payloads}, {"bits": bits} | parameters if bits else parameters)


def held(server):
    """A gate, and a call that holds the one thread that computes."""
    return Gate(server.repository.get("net.tail"))


def test_requests_that_wait_share_a_batch_by_width_and_in_their_order(bundle):
    with serving(bundle.directory) as (server, caller):
        gate = held(server)
        infer = caller.stub("ModelInfer")
        calls = [infer.future(asking(bundle), timeout=60)]
        until(gate.reached.is_set)
        for number, (count, bits) in enumerate(((3, None), (2, 7), (3, None), (4, None), (2, 7), (1, None)), 1):
            calls.append(infer.future(asking(bundle, count, bits), timeout=60))
            until(lambda number=number: server._batcher.waiting == number)
        gate.open.set()
        answers = [call.result() for call in calls]
    # The last one fits into the first batch, but does not overtake the one of 4 before it.
    assert gate.sizes == [[1], [3, 3], [2, 2], [4, 1]]
    assert [each.parameters["batch"].int64_param for each in answers] == [1, 6, 4, 6, 5, 4, 5]
    for (count, bits), answer in zip(((3, None), (2, 7)), answers[1:], strict=False):
        torch.testing.assert_close(
            outputs_of(answer)["logits"], Pipeline(bundle, bits=bits).run(images(count)).logits, atol=1e-6, rtol=1e-6
        )


def test_a_request_waits_for_others_where_it_is_told_to(bundle):
    with serving(bundle.directory, wait=30.0) as (server, caller):
        gate = held(server)
        gate.open.set()
        infer = caller.stub("ModelInfer")
        first = infer.future(asking(bundle, 5), timeout=60)
        until(lambda: server._batcher.waiting == 1)
        second = infer.future(asking(bundle, 3), timeout=60)  # the batch is full, so nobody waits any longer
        assert {first.result().parameters["batch"].int64_param, second.result().parameters["batch"].int64_param} == {8}


def test_a_full_queue_refuses_at_once_and_still_tells_that_it_is_alive(bundle):
    with serving(bundle.directory, queue=3) as (server, caller):
        gate = held(server)
        infer = caller.stub("ModelInfer")
        calls = [infer.future(asking(bundle), timeout=60)]
        until(gate.reached.is_set)
        calls += [infer.future(asking(bundle), timeout=60) for _ in range(3)]
        until(lambda: server._batcher.waiting == 3)
        code, words = caller.status(asking(bundle))
        assert (code, words) == ("RESOURCE_EXHAUSTED", "3 requests wait already; try again a little later")
        assert caller("ServerReady").ready
        gate.open.set()
        assert all(call.result().outputs for call in calls)
        assert server.metrics.counts() == {"OK": 4, "RESOURCE_EXHAUSTED": 1}


def test_work_that_nobody_waits_for_is_not_computed(bundle):
    with serving(bundle.directory, queue=3) as (server, caller):
        gate = held(server)
        infer = caller.stub("ModelInfer")
        first = infer.future(asking(bundle), timeout=60)
        until(gate.reached.is_set)
        late = infer.future(asking(bundle), timeout=2.0)
        gone = infer.future(asking(bundle, timeout=1_000_000), timeout=60)  # microseconds
        left = infer.future(asking(bundle), timeout=60)
        until(lambda: server._batcher.waiting == 3)
        left.cancel()
        for call in (late, gone):
            assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: sum(server.metrics.counts().values()) == 3)
        again = infer.future(asking(bundle, 2), timeout=60)  # there is room again
        until(lambda: server._batcher.waiting >= 1)
        gate.open.set()
        assert first.result().outputs
        assert again.result().outputs
        assert gate.sizes == [[1], [2]]
        # A caller whose deadline has passed goes too, and either may be known here first.
        counts = server.metrics.counts()
        assert counts.pop("OK") == 2
        assert counts.keys() == {"DEADLINE_EXCEEDED", "CANCELLED"}
        assert sum(counts.values()) == 3


def test_one_that_fails_does_not_spoil_those_it_shares_a_batch_with(bundle):
    with serving(bundle.directory) as (server, caller):
        model = server.repository.get("net.tail")
        own = model.run
        model.run = lambda given: own(given) if all(each.rows != 2 for each in given) else 1 / 0
        gate = held(server)
        infer = caller.stub("ModelInfer")
        calls = [infer.future(asking(bundle, 1), timeout=60)]
        until(gate.reached.is_set)
        calls += [infer.future(asking(bundle, count), timeout=60) for count in (2, 3)]
        until(lambda: server._batcher.waiting == 2)
        gate.open.set()
        codes = [call.code().name for call in calls]
    assert codes == ["OK", "INTERNAL", "OK"]
    assert "ZeroDivisionError" in calls[1].details()


def test_a_stream_that_takes_no_answers_is_not_read(bundle):
    with serving(bundle.directory) as (server, caller):
        sent, stop = [], threading.Event()

        def requests():
            for number in range(10_000):
                if stop.is_set():
                    return
                sent.append(number)
                yield asking_of

        asking_of = asking(bundle)
        asking_of.inputs.add(name="x" * 100_000)  # large, so that no buffer hides it
        call = caller.stub("ModelStreamInfer")(requests(), timeout=60)
        assert next(call).error_message
        until(lambda: server.metrics.counts().get("INVALID_ARGUMENT", 0) >= 16)
        threading.Event().wait(0.3)
        assert len(sent) < 2000
        call.cancel()
        stop.set()
        until(lambda: not server._streams._open)
        assert caller.status(asking(bundle)) == ("OK", "")


def test_streams_are_bounded_and_leave_nothing_behind(bundle):
    with serving(bundle.directory, streams=1) as (server, caller):
        gate = held(server)
        wait = threading.Event()

        def requests():
            yield asking(bundle)
            wait.wait(30)

        call = caller.stub("ModelStreamInfer")(requests(), timeout=60)
        until(gate.reached.is_set)
        with pytest.raises(grpc.RpcError, match="1 streams are open already"):
            next(caller.stub("ModelStreamInfer")(iter([asking(bundle)]), timeout=60))
        call.cancel()
        wait.set()
        gate.open.set()
        until(lambda: not server._streams._open and server._handlers.idle(0))
        assert next(caller.stub("ModelStreamInfer")(iter([asking(bundle)]), timeout=60)).infer_response.outputs


def known_jobs():
    return sum(type(each) is Job for each in gc.get_objects())


def test_a_request_is_forgotten_when_it_has_ended_however_it_did(bundle):
    with serving(bundle.directory, queue=2) as (server, caller):
        wrong = asking(bundle)
        wrong.raw_input_contents[0] = wrong.raw_input_contents[0][:-1]
        caller.status(wrong)
        gc.collect()
        before = known_jobs()
        gc.disable()  # what hangs together in a circle stays until all of memory is searched
        try:
            for _ in range(20):
                assert caller.status(asking(bundle))[0] == "OK"
                assert caller.status(wrong)[0] == "INVALID_ARGUMENT"
                assert caller.status(asking(bundle, timeout=1))[0] == "DEADLINE_EXCEEDED"  # a microsecond
                caller.stub("ModelInfer").future(asking(bundle), timeout=60).cancel()
                answers = list(caller.stub("ModelStreamInfer")(iter([asking(bundle), wrong] * 2), timeout=60))
                assert len(answers) == 4
                left = caller.stub("ModelStreamInfer")(iter([asking(bundle), wrong] * 4), timeout=60)
                next(left)
                left.cancel()
            until(lambda: not server._streams._open and server._handlers.idle(0))
            for _ in range(100):  # threads may still be at their last one, and those that wait for work may hold it
                if (left_over := known_jobs() - before) < 20:
                    break
                time.sleep(0.1)
            assert left_over < 20
        finally:
            gc.enable()


class Context:
    """Of a call whose client goes when told to."""

    def __init__(self):
        self.callbacks = []

    def add_callback(self, callback):
        self.callbacks.append(callback)
        return True

    def time_remaining(self):
        return 60.0


def test_a_stream_whose_client_has_gone_is_closed_though_nobody_asks_for_its_next_answer(bundle):
    with serving(bundle.directory, streams=1) as (server, _):
        wait, context = threading.Event(), Context()

        def requests():
            yield asking(bundle)
            wait.wait(30)

        answers = server._streams(requests(), context)
        assert next(answers).infer_response.outputs
        assert len(server._streams._open) == 1
        for callback in context.callbacks:
            callback()
        assert not server._streams._open  # `answers` stands where it stood
        wait.set()


# --- the end ----------------------------------------------------------------------------------------------------------


def test_draining_answers_what_was_accepted_and_refuses_the_rest(bundle):
    with serving(bundle.directory) as (server, caller):
        gate = held(server)
        wait = threading.Event()

        def requests():
            yield asking(bundle)
            wait.wait(30)

        stream = caller.stub("ModelStreamInfer")(requests(), timeout=60)
        until(gate.reached.is_set)
        calls = [caller.stub("ModelInfer").future(asking(bundle), timeout=60) for _ in range(5)]
        until(lambda: server._batcher.waiting == 5)
        with ThreadPoolExecutor(1) as pool:
            drained = pool.submit(server.drain, 30.0)
            until(lambda: server._handlers.draining)
            assert caller.status(asking(bundle))[0] == "UNAVAILABLE"
            assert not caller("ServerReady").ready
            gate.open.set()
            assert all(call.result().outputs for call in calls)
            assert next(stream).infer_response.outputs
            with pytest.raises(grpc.RpcError, match="about to stop"):
                next(stream)
            wait.set()
            assert drained.result()
        assert caller.status(asking(bundle))[0] == "UNAVAILABLE"
        for wrong in (0, -1, float("nan"), "1"):
            with pytest.raises(ValueError, match="grace must be a positive number"):
                server.drain(wrong)


@pytest.mark.parametrize("streams", [False, True])
def test_those_who_ask_without_a_pause_are_refused_with_one_status(bundle, streams):
    with serving(bundle.directory) as (server, caller):
        request, answered, refused, stop = asking(bundle), [], [], threading.Event()

        def ask():
            if not streams:
                return [caller.infer(request)]
            answers = list(caller.stub("ModelStreamInfer")(iter([request] * 3), timeout=60))
            return [each for each in answers if not each.error_message]

        with ThreadPoolExecutor(6) as pool:
            for _ in range(6):
                pool.submit(ask_on, ask, answered, refused, stop)
            until(lambda: len(answered) > 20)
            assert server.drain(60.0)
            until(lambda: len(refused) > 6)
            stop.set()
        assert set(refused) == {"UNAVAILABLE"}
        if not streams:
            assert server.metrics.counts()["OK"] == len(answered)


def test_what_is_not_answered_in_time_is_refused_in_the_end(bundle):
    with serving(bundle.directory) as (server, caller):
        gate = held(server)
        calls = [caller.stub("ModelInfer").future(asking(bundle), timeout=60)]
        until(gate.reached.is_set)
        calls += [caller.stub("ModelInfer").future(asking(bundle), timeout=60) for _ in range(2)]
        until(lambda: server._batcher.waiting == 2)
        with ThreadPoolExecutor(1) as pool:
            drained = pool.submit(server.drain, 0.2)
            until(lambda: all(call.done() for call in calls))
            assert not drained.result()  # though what is computed cannot be cut short
            gate.open.set()
        # The one that was being computed too: CANCELLED would mean that its caller had gone.
        assert [call.code().name for call in calls] == ["UNAVAILABLE"] * 3
        assert all("stopped before" in call.details() for call in calls)


# --- settings and metrics ---------------------------------------------------------------------------------------------


def test_metrics_are_read_on_a_port_of_their_own(bundle):
    with serving(bundle.directory, metrics_port=0) as (server, caller):
        assert caller.status(asking(bundle, 3)) == ("OK", "")
        assert caller.status(request_of("nobody", {}))[0] == "NOT_FOUND"
        address = f"http://127.0.0.1:{server.metrics_port}"
        until(lambda: len(server.metrics.counts()) == 2)
        text = urllib.request.urlopen(f"{address}/metrics").read().decode()
        assert 'cleave_requests_total{model="net.tail",status="OK"} 1\n' in text
        assert 'cleave_requests_total{model="",status="NOT_FOUND"} 1\n' in text
        assert 'cleave_batch_samples_bucket{model="net.tail",le="4"} 1\n' in text
        assert "cleave_queue_requests 0\n" in text
        for stage in ("total", "wait", "compute"):
            assert f'cleave_stage_seconds_count{{model="net.tail",stage="{stage}"}} 1\n' in text
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address}/other")
        with pytest.raises(OSError, match=f"{server.metrics_port}: the port is in use; choose another metrics_port"):
            Server(server.repository, port=0, metrics_port=server.metrics_port)


def test_metrics_are_for_this_machine_unless_told_otherwise(bundle):
    with serving(bundle.directory, metrics_port=0, host="0.0.0.0", trust=Trust(insecure=True)) as (server, _):
        assert server._metrics_server._server.server_address[0] == "127.0.0.1"
    if not socket.has_ipv6:
        pytest.skip("there is no IPv6 here")
    with serving(bundle.directory, metrics_port=0, metrics_host="::1") as (server, _):
        answer = urllib.request.urlopen(f"http://[::1]:{server.metrics_port}/metrics")
        assert b"cleave_queue_requests 0" in answer.read()


def test_a_port_in_use_and_settings_out_of_range_are_named(bundle):
    with serving(bundle.directory) as (server, _):
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port}: the port is in use"):
            Server(server.repository, port=server.port)
        for settings, words in (
            ({"port": 70_000}, "port must be a whole number, 0 to 65535"),
            ({"streams": 0}, "streams must be a whole number"),
            ({"message_bytes": 0}, "message_bytes must be a whole number from 1"),
            ({"message_bytes": 100}, "message_bytes=100 is too little for what is served"),
            ({"port": 9, "metrics_port": 9}, "port=9 and metrics_port=9 are one port"),
            ({"host": "127.0.0.1:8005"}, "host must be a host's name or address without its port"),
            ({"host": "http://127.0.0.1"}, "host must be a host's name or address without its port"),
            ({"metrics_host": ""}, "metrics_host must be a host's name"),
        ):
            with pytest.raises(ValueError, match=words):
                Server(server.repository, **{"port": 0, **settings})
        for host, words in (("192.0.2.1", "192.0.2.1 is not this machine's"), ("no-such.invalid", "nobody here knows")):
            with pytest.raises(OSError, match=words):
                Server(server.repository, host=host, port=0, trust=Trust(insecure=True))
    for settings in ({"samples": 0}, {"queue": 1.5}, {"workers": True}, {"wait": -1}, {"wait": float("inf")}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"{name} must be"):
            Batcher(**settings)
    with pytest.raises(ValueError, match="workers=3 of threads=2 each would share 4 cores"):
        checked_threads(3, 2, 4)
    for samples in (0, 257, 8.0):
        with pytest.raises(ValueError, match="samples must be a whole number from 1 to 256"):
            Repository(samples=samples)


def test_messages_are_as_large_as_the_bundles_need(tmp_path):
    make_bundle(tmp_path / "net", "fixed")
    with serving(tmp_path / "net", message_bytes=100_000, repository=Repository(folder=tmp_path)) as (server, caller):
        code, _ = caller.status(request_of("net.tail", {"payload": [b"\0" * 200_000]}))
        assert code == "RESOURCE_EXHAUSTED"  # before it is in memory
        server.repository.message_bytes = 100
        with pytest.raises(grpc.RpcError, match="needs messages of .* start it with message_bytes="):
            caller("RepositoryModelLoad", model_name="net")
