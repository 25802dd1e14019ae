"""The device client: over the wire it answers as a pipeline does, and it copes with servers that are away."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
import torch

from cleave.deployment import (
    Breaker,
    BundleError,
    CodecError,
    Device,
    PayloadError,
    Pipeline,
    Repository,
    Retries,
    Server,
    ServingError,
    build_policy,
    code_codec,
    export_bundle,
    load_bundle,
)
from cleave.deployment.runtime.asking.retrying import LinkEstimate

from .deployment_networks import (
    INPUT,
    OUTPUTS,
    SHAPE,
    SampleDevice,
    device_part,
    edge,
    entropy_codec,
    entropy_parts,
    exit_bundle,
    exit_images,
    images,
    make_bundle,
    returning_parts,
    server_part,
)
from .serving_client import PATIENT, Gate, serving, until

EXITS = {"confidence": 0.6, "patience": 1, "ensemble": 0.6}
QUICK = Retries(timeout=60.0, attempts=2, pause=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for kind in ("fixed", "float", "whole"):
        make_bundle(folder / kind, kind)
    for coding in ("sparse", "tiled_png"):
        torch.manual_seed(1)
        parts = [device_part(SampleDevice()), server_part()]
        edges = [edge("head", "tail", cut=code_codec(coding, SHAPE, 6))]
        export_bundle(folder / coding, parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    entropy = [edge("head", "tail", cut=entropy_codec())]
    export_bundle(folder / "entropy", entropy_parts(), entropy, input=INPUT, outputs=OUTPUTS, images=images())
    for kind, threshold in EXITS.items():
        cascade = kind != "ensemble"
        settings = {"split": "layer1", "cascade": cascade, "seed": 112 if cascade else 3}
        policy = build_policy(kind, threshold, exits=3)
        exit_bundle(folder / kind, policy, placements=("device", "server", "server"), **settings)
    parts, edges = returning_parts()
    export_bundle(folder / "linked", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    return folder


@pytest.fixture(scope="module")
def server(folder):
    served = [each for each in folder.iterdir() if each.name != "whole"]
    with serving(*served, repository=Repository(samples=8)) as (server, _):
        yield server


def device_of(folder, kind, server, placement="device", **settings):
    settings = {"retries": PATIENT, **settings}
    return Device(load_bundle(folder / kind, placement=placement), f"127.0.0.1:{server.port}", **settings)


def same(answered, expected):
    assert answered.result.payloads == expected.payloads
    assert answered.result.payload_bytes == expected.payload_bytes
    for name, tensor in expected.outputs.items():
        assert torch.equal(answered.result.outputs[name], tensor)
    assert (answered.result.exits is None) == (expected.exits is None)
    assert expected.exits is None or torch.equal(answered.result.exits, expected.exits)


# --- as a pipeline ----------------------------------------------------------------------------------------------------


def test_tries_are_those_of_each_sample_where_a_batch_is_asked_in_parts(folder):
    batch = images(8)
    with (
        serving(folder / "fixed", repository=Repository(samples=3)) as (server, _),
        device_of(folder, "fixed", server) as device,
    ):
        answered = device.run(batch)
    same(answered, Pipeline(load_bundle(folder / "fixed")).run(batch))
    assert answered.attempts == (1,) * 8


@pytest.mark.parametrize("kind", ["fixed", "float", "sparse", "tiled_png", "entropy", *EXITS])
def test_over_the_wire_all_is_as_in_one_process_bit_by_bit(kind, folder, server):
    batch = exit_images(8, seed=4) if kind in EXITS else images(8)
    pipeline = Pipeline(load_bundle(folder / kind))
    with device_of(folder, kind, server) as device:
        for count in range(1, 9):
            answered = device.run(batch[:count])
            same(answered, pipeline.run(batch[:count]))
        sent = [bool(count) for count in answered.result.payload_bytes]
        assert list(answered.attempts) == [int(each) for each in sent]
        if kind in EXITS:  # some left here, but by patience nobody can at the first exit
            assert len(set(sent)) == (1 if kind == "patience" else 2)
        assert set(answered.flags) == {""}
        assert answered.seconds.keys() == {"device", "encode", "link", "wait", "server"}


def test_another_width_goes_along(folder, server):
    with device_of(folder, "sparse", server, bits=3) as device:
        same(device.run(images(4)), Pipeline(load_bundle(folder / "sparse"), bits=3).run(images(4)))
    with pytest.raises(CodecError, match="bits must be"):
        device_of(folder, "sparse", server, bits=1)


def test_a_local_service_calls_a_host_and_goes_on(folder):
    with (
        serving(folder / "linked", repository=Repository(placement="host")) as (server, _),
        device_of(folder, "linked", server, placement="local") as device,
    ):
        same(device.run(images(3)), Pipeline(load_bundle(folder / "linked")).run(images(3)))
        assert device.side.waiting == ()


def test_a_batch_larger_than_a_server_takes_goes_in_parts(folder):
    with (
        serving(folder / "ensemble", repository=Repository(samples=3)) as (server, _),
        device_of(folder, "ensemble", server) as device,
    ):
        answered, expected = device.run(exit_images(20, seed=4)), Pipeline(load_bundle(folder / "ensemble"))
        result = expected.run(exit_images(20, seed=4))
        assert torch.equal(answered.result.exits, result.exits)
        torch.testing.assert_close(answered.result.logits, result.logits)
        assert answered.result.payloads == result.payloads


def test_results_are_lines_of_plain_values(folder, server):
    bundle = load_bundle(folder / "confidence")
    with device_of(folder, "confidence", server) as device:
        answered = device.run(exit_images(8, seed=4))
    lines = answered.lines(bundle)
    for row, line in enumerate(lines):
        assert line["class"] == bundle.class_names[int(answered.result.logits[row].argmax())]
        assert line["exit"] == bundle.manifest.exits[int(answered.result.exits[row])].name
        assert line["bytes"] == answered.result.payload_bytes[row]
        assert line["attempts"] == answered.attempts[row]
        assert line["flag"] == ""
        assert line["milliseconds"].keys() == answered.seconds.keys()


def test_a_sample_that_fails_on_the_server_fails_alone(folder, server):
    with device_of(folder, "fixed", server) as device:
        encode = device.side.run

        def damaging(arrived, request):
            outcome = encode(arrived, request)
            payloads = outcome.messages["server"].payloads["cut"]
            payloads[1] = payloads[1][:-1] + bytes([payloads[1][-1] ^ 1])
            return outcome

        device.side.run = damaging
        with pytest.raises(PayloadError) as error:
            device.run(images(3))
    assert list(error.value.errors) == [1]
    assert "payload 1" in str(error.value)
    logits = error.value.outcome.result.logits
    assert torch.equal(logits[[0, 2]], Pipeline(load_bundle(folder / "fixed")).run(images(3)[[0, 2]]).logits)
    assert logits[1].isnan().all()


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_answers_in_order_and_holds_a_few_batches_alone(folder, server):
    taken = []

    def batches():
        for number in range(20):
            taken.append(number)
            yield exit_images(1 + number % 3, seed=number)

    pipeline = Pipeline(load_bundle(folder / "patience"))
    with device_of(folder, "patience", server, in_flight=3) as device:
        for number, answered in enumerate(device.stream(batches())):
            assert len(taken) <= number + 3
            expected = pipeline.run(exit_images(1 + number % 3, seed=number))
            assert torch.equal(answered.result.exits, expected.exits)
            torch.testing.assert_close(answered.result.logits, expected.logits)
    assert len(taken) == 20


def test_an_answer_that_is_there_is_not_held_up_by_the_next_batches(folder, server):
    taken = []
    with device_of(folder, "float", server, in_flight=4) as device:
        known = device.remotes["server"].link._known

        def batches():
            for number in range(5):
                taken.append(number)
                before = len(known)
                yield images(1, seed=number)
                until(lambda before=before: len(known) > before)  # the answer has come
                time.sleep(0.05)

        counts = [len(taken) for _ in device.stream(batches())]
    assert counts[0] <= 3  # in_flight would be 4
    assert len(counts) == 5


def test_a_stream_sends_while_others_wait(folder, server):
    gate = Gate(server.repository.get("float.tail"))
    try:
        with device_of(folder, "float", server, in_flight=3) as device:
            stream = device.stream(images(1, seed=n) for n in range(6))
            first = []
            thread = threading.Thread(target=lambda: first.extend(stream))
            thread.start()
            # Three are on their way; how many of them share the first batch is a matter of chance.
            until(lambda: gate.reached.is_set() and gate.held + server._batcher.waiting == 3)
            gate.open.set()
            thread.join()
            assert len(first) == 6
    finally:
        gate.open.set()
        del server.repository.get("float.tail").run


# --- servers that are away --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nowhere():
    """A port where nobody listens."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{found.getsockname()[1]}"


def test_without_a_fallback_an_absent_server_is_an_error(folder, nowhere):
    with Device(load_bundle(folder / "fixed", placement="device"), nowhere, retries=QUICK) as device:
        with pytest.raises(ServingError, match=nowhere) as error:
            device.run(images(2))
        assert (error.value.code, error.value.attempts) == ("UNAVAILABLE", 2)
        assert device.side.waiting == ()


@pytest.mark.parametrize("kind", EXITS)
def test_the_best_exit_of_this_side_answers_those_who_would_have_gone_on(kind, folder, nowhere):
    bundle = load_bundle(folder / kind)
    batch = exit_images(8, seed=4)
    expected = Pipeline(bundle).run(batch)
    gone = (expected.exits > 0).tolist()
    assert any(gone)
    everyone = Pipeline(bundle, policy=build_policy(kind, None, exits=3).with_deadline(1, [1, 2, 3])).run(batch)
    with Device(bundle, nowhere, retries=QUICK, fallback="exit") as device:
        answered = device.run(batch)
        assert answered.flags == tuple("exit" if each else "" for each in gone)
        assert answered.attempts == tuple(0 for _ in gone)  # nobody reached the server to ask
        assert set(answered.result.exits.tolist()) == {0}
        torch.testing.assert_close(answered.result.logits, everyone.logits)


def test_a_whole_model_answers_in_a_servers_place(folder, nowhere):
    local = load_bundle(folder / "whole")
    bundle = load_bundle(folder / "fixed", placement="device")
    with Device(bundle, nowhere, retries=QUICK, fallback="local", local=local) as device:
        answered = device.run(images(3))
    assert torch.equal(answered.result.logits, Pipeline(local).run(images(3)).logits)
    assert answered.flags == ("local",) * 3
    assert [line["flag"] for line in answered.lines(bundle)] == ["local"] * 3


def test_what_the_request_itself_is_refused_for_no_fallback_hides(folder, server):
    with device_of(folder, "confidence", server, fallback="exit") as device:
        device.connect()
        device.remotes["server"].model = "confidence.nobody"
        with pytest.raises(ServingError, match="there is no model 'confidence.nobody'"):
            device.run(exit_images(8, seed=4))


def test_a_server_that_comes_back_is_found(folder):
    repository = Repository()
    repository.add(folder / "fixed")
    bundle = load_bundle(folder / "fixed", placement="device")
    expected = Pipeline(load_bundle(folder / "fixed")).run(images(2)).logits
    with serving(folder / "fixed") as (server, _):
        device = Device(bundle, f"127.0.0.1:{server.port}", retries=Retries(timeout=30.0, attempts=200))
        assert torch.equal(device.run(images(2)).result.logits, expected)
        port = server.port
    found = []
    thread = threading.Thread(target=lambda: found.append(device.run(images(2))))
    thread.start()
    with Server(repository, port=port):
        thread.join()
    device.close()
    assert torch.equal(found[0].result.logits, expected)


def test_a_request_that_takes_too_long_is_given_up(folder, server):
    gate = Gate(server.repository.get("fixed.tail"))
    try:
        with device_of(folder, "fixed", server, retries=Retries(timeout=0.3)) as device:
            device.connect()
            with pytest.raises(ServingError) as error:
                device.run(images(1))
        assert error.value.code == "DEADLINE_EXCEEDED"
    finally:
        gate.open.set()
        del server.repository.get("fixed.tail").run


# --- servers that change ----------------------------------------------------------------------------------------------


def test_who_has_an_older_version_goes_on_with_it_when_a_newer_one_comes(folder, tmp_path):
    for version, kind in ((1, "fixed"), (2, "float"), (3, "sparse")):
        shutil.copytree(folder / kind, tmp_path / "all/net" / str(version))
    for version in (1, 2):
        shutil.copytree(tmp_path / "all/net" / str(version), tmp_path / "net" / str(version))
    expected = [Pipeline(load_bundle(tmp_path / "net" / str(each))).run(images(3)) for each in (1, 2)]
    with serving(tmp_path / "net", repository=Repository(folder=tmp_path)) as (server, caller):
        # Called for the folder around their version, as the server calls it.
        devices = [device_of(tmp_path / "net", str(each), server) for each in (1, 2)]
        for device, wanted in zip(devices, expected, strict=True):
            same(device.run(images(3)), wanted)
        shutil.copytree(tmp_path / "all/net/3", tmp_path / "net/3")
        caller("RepositoryModelLoad", model_name="net")
        for device, wanted in zip(devices, expected, strict=True):
            same(device.run(images(3)), wanted)
        shutil.rmtree(tmp_path / "net/2")
        caller("RepositoryModelLoad", model_name="net")
        same(devices[0].run(images(3)), expected[0])
        with pytest.raises(BundleError, match="this side has .*, as none of its versions 3, 1 has"):
            devices[1].run(images(3))
        for device in devices:
            device.close()


def test_a_server_that_is_back_with_smaller_batches_is_asked_in_parts(folder):
    repositories = [Repository(samples=each) for each in (8, 2)]
    for repository in repositories:
        repository.add(folder / "fixed")
    expected = Pipeline(load_bundle(folder / "fixed")).run(images(5))
    with Server(repositories[0], port=0) as first, device_of(folder, "fixed", first) as device:
        same(device.run(images(5)), expected)
        first.close()
        with Server(repositories[1], port=first.port):
            answered = device.run(images(5))
            assert answered.result.payloads == expected.payloads
            # A batch of another size differs in the last bits.
            torch.testing.assert_close(answered.result.logits, expected.logits)
            assert device.remotes["server"].connect() == 2


def test_a_device_that_is_closed_says_so(folder, server):
    local = load_bundle(folder / "whole")
    device = device_of(folder, "fixed", server, fallback="local", local=local)
    device.connect()
    device.close()
    device.close()
    stream = device.stream([images(1)])
    for ask in (lambda: device.run(images(1)), device.connect, lambda: next(stream)):
        with pytest.raises(ValueError, match=f"the connection to .*{server.port} is closed; make a new device"):
            ask()


def test_who_leaves_a_stream_waits_for_nobody_and_closing_ends_what_is_on_its_way(folder, server):
    gate = Gate(server.repository.get("float.tail"))
    try:
        device = device_of(folder, "float", server, in_flight=4, retries=Retries(timeout=3600.0))

        def batches():
            yield from (images(1, seed=n) for n in range(2))
            raise OSError("the camera is gone")

        with pytest.raises(OSError, match="the camera is gone"):
            list(device.stream(batches()))
        until(gate.reached.is_set)
        device.close()
        until(lambda: not [each for each in threading.enumerate() if each.name.startswith("device")])
        assert not gate.open.is_set()  # nobody has answered
    finally:
        gate.open.set()
        del server.repository.get("float.tail").run


def test_what_was_never_sent_counts_no_bytes(folder, nowhere):
    bundle = load_bundle(folder / "confidence")
    batch = exit_images(8, seed=4)
    assert any(Pipeline(bundle).run(batch).payload_bytes)
    with Device(bundle, nowhere, retries=QUICK, fallback="exit") as device:
        answered = device.run(batch)
        assert [line["bytes"] for line in answered.lines(bundle)] == [0] * 8


def test_arguments_of_another_kind_are_named(folder):
    bundle = load_bundle(folder / "fixed")
    for settings, words in (
        ({"bundle": str(folder / "fixed")}, "bundle cannot be .*a str; load_bundle"),
        ({"trust": "cert.pem"}, "trust cannot be 'cert.pem', a str; Trust"),
        ({"retries": 3}, "retries cannot be 3, an? int; Retries"),
        ({"local": "DIR", "fallback": "local"}, "local cannot be 'DIR', a str; load_bundle"),
    ):
        with pytest.raises(TypeError, match=words):
            Device(**{"bundle": bundle, "server": "127.0.0.1:1", **settings})
    with pytest.raises(TypeError, match="repository cannot be 'DIR', a str; make a Repository"):
        Server("DIR")
    with pytest.raises(TypeError, match="onward cannot be 'x', a str; Onward"):
        Server(Repository(), port=0, onward="x")


# --- retries, the breaker and the link --------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now, self.slept = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def failing(codes):
    left = list(codes)

    def call(seconds):
        if left:
            raise ServingError(left.pop(0), "no")
        return seconds

    return call


def test_retries_pause_longer_each_time_and_end_with_the_deadline():
    clock = Clock()
    retries = Retries(timeout=10.0, attempts=5, pause=1.0, longest=3.0)
    left, attempts = retries.run(failing(["UNAVAILABLE", "RESOURCE_EXHAUSTED", "UNAVAILABLE"]), clock, clock.sleep)
    assert attempts == 4
    assert left == 10.0 - sum(clock.slept)
    for slept, most in zip(clock.slept, (1.0, 2.0, 3.0), strict=True):
        assert most / 2 <= slept <= most
    clock = Clock()
    with pytest.raises(ServingError) as error:
        Retries(timeout=2.0, attempts=50, pause=1.0).run(failing(["UNAVAILABLE"] * 50), clock, clock.sleep)
    assert error.value.attempts < 5
    assert clock.now < 2.0
    for code in ("INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "UNAUTHENTICATED", "INTERNAL"):
        with pytest.raises(ServingError) as error:
            retries.run(failing([code]), clock, clock.sleep)
        assert error.value.attempts == 1
    for settings in ({"timeout": 0}, {"attempts": 0}, {"pause": float("nan")}, {"longest": -1}, {"attempts": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
            Retries(**settings)


def test_the_breaker_lets_one_through_after_its_pause():
    clock = Clock()
    breaker = Breaker(failures=3, pause=5.0, clock=clock)
    for code in ("UNAVAILABLE", "UNAVAILABLE", "INVALID_ARGUMENT", "UNAVAILABLE", "DEADLINE_EXCEEDED"):
        breaker.check()
        breaker.note(code)
    breaker.check()
    breaker.note("UNAVAILABLE")
    with pytest.raises(ServingError, match="edge:1 was away 3 times in a row; it is asked again in 5.0 seconds"):
        breaker.check("edge:1")
    clock.now = 5.5
    breaker.check()  # this one tries
    with pytest.raises(ServingError):
        breaker.check()
    breaker.note("OK")
    breaker.check()
    with pytest.raises(ValueError, match="failures must be"):
        Breaker(failures=0)
    with pytest.raises(ValueError, match="pause must be"):
        Breaker(pause=0)


def test_an_open_circuit_costs_no_tries(folder, nowhere):
    bundle = load_bundle(folder / "fixed", placement="device")
    with Device(bundle, nowhere, retries=QUICK, breaker=lambda: Breaker(failures=2, pause=600)) as device:
        for attempts in (2, 0, 0):
            with pytest.raises(ServingError) as error:
                device.run(images(1))
            assert error.value.attempts == attempts


def test_the_link_is_known_from_what_went_over_it(folder, server):
    link = LinkEstimate()
    assert (link.round_trip, link.bytes_per_second) == (None, None)
    for count in (1000, 5000, 9000):
        link.add(count, 0.02 + count / 1e6)
    assert link.round_trip == pytest.approx(0.02)
    assert link.bytes_per_second == pytest.approx(1e6)
    same_size = LinkEstimate()
    same_size.add(1000, 0.03)
    same_size.add(1000, 0.02)
    assert (same_size.round_trip, same_size.bytes_per_second) == (0.02, None)
    with device_of(folder, "fixed", server) as device:
        device.run(images(1))
        assert device.link.round_trip > 0


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_bundles_of_other_digests_are_both_named(folder, tmp_path, server):
    shutil.copytree(folder / "entropy", tmp_path / "fixed")
    bundle = load_bundle(tmp_path / "fixed", placement="device")
    theirs = load_bundle(folder / "fixed").manifest.digest
    with (
        Device(bundle, f"127.0.0.1:{server.port}", retries=PATIENT) as device,
        pytest.raises(BundleError, match=f"of the bundle {theirs}, this side has {bundle.manifest.digest}"),
    ):
        device.run(images(1))


def test_settings_that_do_not_fit_are_named(folder, tmp_path):
    fixed, confidence = (load_bundle(folder / kind) for kind in ("fixed", "confidence"))
    exit_bundle(tmp_path / "late", build_policy("confidence", 0.5, exits=2), exits=("layer2", "final"),
                placements=("device", "server", "server"), split="layer1")  # fmt: skip
    late, whole = load_bundle(tmp_path / "late"), load_bundle(folder / "whole")
    for arguments, words in (
        ((fixed, "nowhere"), "server=nowhere must be HOST:PORT"),
        ((fixed, "host:99999"), "must be HOST:PORT"),
        ((fixed, {"cloud": "a:1"}), "names the placement 'cloud'; the others of this bundle are server"),
        ((whole, "a:1"), "runs on device alone"),
    ):
        with pytest.raises(ValueError, match=words):
            Device(*arguments)
    for bundle, settings, words in (
        (fixed, {"fallback": "exits"}, "fallback must be one of error, exit, local"),
        (fixed, {"fallback": "exit"}, "needs an exit on device; the exits of this bundle are: none at all"),
        (late, {"fallback": "exit"}, "needs an exit on device; .*: layer2 on server, final on server"),
        (fixed, {"fallback": "local"}, "fallback=local with no local bundle"),
        (fixed, {"local": whole}, "fallback=error with the local bundle"),
        (confidence, {"fallback": "local", "local": whole}, "takes or answers something else"),
        (fixed, {"in_flight": 0}, "in_flight must be"),
    ):
        with pytest.raises(ValueError, match=words):
            Device(bundle, "127.0.0.1:1", **settings)
