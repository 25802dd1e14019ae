"""Routes over several places: the edge is a server to the device, and a client to the cloud."""

from __future__ import annotations

import contextlib

import pytest
import torch

from cleave.deployment import (
    Breaker,
    Device,
    Onward,
    PayloadError,
    Pipeline,
    Repository,
    Retries,
    Server,
    ServingError,
    build_policy,
    load_bundle,
)

from .deployment_networks import exit_bundle, exit_images, images, make_bundle
from .serving_client import PATIENT, Caller, Gate, outputs_of, request_of, serving

QUICK = Retries(timeout=60.0, attempts=2, pause=0.01)


@contextlib.contextmanager
def tiers(folder, first="device", last="server", **settings):
    """A cloud, an edge that calls it, and a device that calls the edge."""
    with serving(folder, repository=Repository(placement=last)) as (cloud, _):
        onward = Onward({last: f"127.0.0.1:{cloud.port}"}, retries=QUICK)
        with (
            serving(folder, repository=Repository(placement="edge"), onward=onward) as (edge, _),
            Device(load_bundle(folder, placement=first), f"127.0.0.1:{edge.port}", retries=QUICK, **settings) as device,
        ):
            yield cloud, edge, device


@pytest.mark.parametrize("bits", [None, 7])
def test_three_places_answer_as_one_pipeline_bit_by_bit(tmp_path, bits):
    bundle = make_bundle(tmp_path / "net", "three")
    with tiers(tmp_path / "net", bits=bits) as (_, _, device):
        for count in range(1, 9):
            expected = Pipeline(bundle, bits=bits).run(images(count))
            answered = device.run(images(count))
            assert torch.equal(answered.result.logits, expected.logits)
            assert answered.result.payloads["cut"] == expected.payloads["cut"]


@pytest.mark.parametrize("kind", ["confidence", "patience", "ensemble"])
@pytest.mark.parametrize("cascade", [False, True])
def test_exits_in_three_places_answer_as_one_pipeline(tmp_path, kind, cascade):
    policy = build_policy(kind, 1 if kind == "patience" else 0.6, exits=3)
    settings = {"placements": ("device", "edge", "cloud"), "cascade": cascade, "split": "layer1"}
    bundle = exit_bundle(tmp_path / "net", policy, seed=112 if cascade else 3, **settings)
    batch = exit_images(8, seed=4)
    expected = Pipeline(bundle).run(batch)
    assert len(expected.exits.unique()) > 1
    with tiers(tmp_path / "net", last="cloud") as (_, _, device):
        answered = device.run(batch)
    assert torch.equal(answered.result.exits, expected.exits)
    assert torch.equal(answered.result.logits, expected.logits)


def test_without_a_cloud_the_edge_says_so_and_the_device_falls_back(tmp_path):
    policy = build_policy("confidence", 0.99, exits=3)
    placements = ("device", "edge", "cloud")
    exit_bundle(tmp_path / "net", policy, placements=placements, split="layer1", seed=3)
    batch = exit_images(8, seed=4)
    with tiers(tmp_path / "net", last="cloud", breaker=lambda: Breaker(failures=100)) as (cloud, edge, device):
        cloud.close()
        with pytest.raises(ServingError, match=f"127.0.0.1:{cloud.port}") as error:
            device.run(batch)
        assert error.value.code == "UNAVAILABLE"
        instead = Device(device.bundle, f"127.0.0.1:{edge.port}", retries=QUICK, fallback="exit")
        flags = instead.run(batch).flags
        instead.close()
    assert "exit" in flags


def test_an_edge_that_does_not_go_on_sends_back_what_goes_on(tmp_path):
    bundle = make_bundle(tmp_path / "net", "three")
    expected = Pipeline(bundle).run(images(3))
    with serving(tmp_path / "net", repository=Repository(placement="edge")) as (edge, caller):
        answer = outputs_of(caller.infer(request_of("net.middle", {"payload": expected.payloads["cut"]})))
        assert answer["next@server"] == expected.payloads["next"]
        with (
            Device(bundle, f"127.0.0.1:{edge.port}", retries=PATIENT) as device,
            pytest.raises(ServingError, match="samples go on to server, whose server is not known"),
        ):
            device.run(images(3))
        # The device itself may call all of them.
        with serving(tmp_path / "net", repository=Repository(placement="server")) as (cloud, _):
            both = {"edge": f"127.0.0.1:{edge.port}", "server": f"127.0.0.1:{cloud.port}"}
            with Device(bundle, both, retries=PATIENT) as device:
                result = device.run(images(3)).result
            assert torch.equal(result.logits, expected.logits)
            assert result.payloads == expected.payloads


def test_a_sample_that_fails_in_the_cloud_fails_alone(tmp_path):
    bundle = make_bundle(tmp_path / "net", "three")
    with tiers(tmp_path / "net") as (_, edge, device):
        model = edge.repository.get("net.middle")
        own = model.run

        def damaging(given):
            (answer,) = own(given)
            payloads = answer.outputs["next@server"]
            payloads[1] = payloads[1][:-1] + bytes([payloads[1][-1] ^ 1])
            return [answer]

        model.run = damaging
        with pytest.raises(PayloadError) as error:
            device.run(images(3))
    assert list(error.value.errors) == [1]
    expected = Pipeline(bundle).run(images(3)).logits
    torch.testing.assert_close(error.value.outcome.result.logits[[0, 2]], expected[[0, 2]])


def test_a_request_has_one_deadline_for_all_places(tmp_path):
    bundle = make_bundle(tmp_path / "net", "three")
    payloads = Pipeline(bundle).run(images(1)).payloads["cut"]
    with tiers(tmp_path / "net") as (cloud, edge, device):
        device.run(images(1))
        gate = Gate(cloud.repository.get("net.tail"))
        caller = Caller(edge.port)
        # By the parameter, so that the edge ends it and not this caller.
        request = request_of("net.middle", {"payload": payloads}, {"timeout": 300_000})
        assert caller.status(request)[0] == "DEADLINE_EXCEEDED"
        gate.open.set()


NO_ADDRESSES = ["here", "", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:x", ":8001", "::1:8001"]
NO_ADDRESSES += ["[::1]", "http://127.0.0.1:8001", " 127.0.0.1:1", "127.0.0.1 :1", "127.0.0.1:1/", "a:١", 8001]


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_addresses_that_are_none_are_named(address, tmp_path):
    with pytest.raises(ValueError, match="servers.cloud=.* must be HOST:PORT"):
        Onward({"cloud": address})
    bundle = make_bundle(tmp_path / "net", "fixed")
    with pytest.raises((ValueError, TypeError), match="server=.* must be HOST:PORT|server cannot be 8001, an int"):
        Device(bundle, address)


def test_a_placement_that_nothing_has_is_named_where_nothing_else_comes(tmp_path):
    make_bundle(tmp_path / "net", "three")
    onward = Onward({"serer": "127.0.0.1:1"})
    words = r"servers.serer=127.0.0.1:1 is of no placement of what is served: .*Did you mean 'server'"
    repository = Repository(placement="edge")
    repository.add(tmp_path / "net")
    with pytest.raises(ValueError, match=words):
        Server(repository, port=0, onward=onward)
    with serving(repository=Repository(placement="edge", folder=tmp_path), onward=onward):
        pass  # what has it may come
