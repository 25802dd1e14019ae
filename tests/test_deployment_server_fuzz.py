"""Requests that are wrong in every way: always a status, no hang, no crash, and a right one is answered between."""

from __future__ import annotations

import random
import resource

import grpc
import pytest
import torch
from google.protobuf.message import DecodeError

from cleave.deployment import Pipeline, Side, build_policy, load_bundle
from cleave.deployment.runtime.wire.protocol import METHODS, Request, message, read

from .deployment_networks import SHAPE, exit_bundle, exit_images, images, make_bundle
from .serving_client import outputs_of, request_of, serving

MAY = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "DEADLINE_EXCEEDED"}
NAMES = [
    "payload",
    "codes",
    "low",
    "high",
    "levels",
    "before",
    "logits",
    "",
    "x" * 3000,
    "\u0000",
    "é\U0001f600",
    "layer1/log_p",
]
DATATYPES = ["BYTES", "FP32", "INT32", "INT64", "UINT8", "FP64", "BOOL", "FP16", "", "bytes"]
SIZES = [0, -1, 1, 2, 3, 8, 9, 2**31, 2**62, -(2**63), 2**63 - 1]
TYPED = {"bool_contents": True, "int_contents": -7, "int64_contents": 2**60, "uint_contents": 300, "uint64_contents": 1,
         "fp32_contents": float("nan"), "fp64_contents": 1e300, "bytes_contents": b"\xff"}  # fmt: skip

PARAMETERS = [
    message("InferParameter")(**{f"{kind}_param": value})
    for kind, value in (
        ("int64", -5),
        ("int64", 2**62),
        ("string", "4"),
        ("double", float("nan")),
        ("bool", True),
        ("int64", 7),
    )
]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    make_bundle(folder / "net", "sample")
    exit_bundle(folder / "early", build_policy("ensemble", 0.6, exits=3), cascade=True, split="layer1", seed=112,
                placements=("device", "server", "server"))  # fmt: skip
    with serving(folder / "net", folder / "early") as (server, caller):
        yield folder, server, caller


def seeds_of(folder):
    """Right requests, of all kinds."""
    net, early = load_bundle(folder / "net"), load_bundle(folder / "early")
    sent = Side(early, "device").run(exit_images(8, seed=4), request=0).messages["server"].payloads
    tensors = {"codes": torch.ones(2, *SHAPE, dtype=torch.int32), "low": torch.zeros(2), "high": torch.ones(2)}
    before = torch.rand(len(sent["layer1"]), 4)
    return [
        request_of("net.tail", {"payload": Pipeline(net).run(images(3)).payloads["cut"]}, {"bits": 5}),
        request_of("net.tail", {**tensors, "levels": torch.tensor([32])}),
        request_of(
            "early.to_layer2", {"payload": sent["layer1"], "before": before, "layer1/log_p": sent["layer1/log_p"]}
        ),
        request_of("early.to_final", {"layer2": torch.rand(2, 4, 6, 6), "layer2/logits": torch.rand(2, 4)}),
    ]


def changed(request, chance):
    """Change one thing."""
    inputs, raws = request.inputs, request.raw_input_contents
    tensor = chance.choice(inputs) if len(inputs) else None
    kind = chance.randrange(14)
    if tensor is None or kind == 0:
        request.model_name = chance.choice(["", "net", "net.tail.", "early.to_final", "../net", "n" * 5000])
    elif kind == 1:
        tensor.name = chance.choice(NAMES)
    elif kind == 2:
        tensor.datatype = chance.choice(DATATYPES)
    elif kind == 3:
        tensor.shape[:] = [chance.choice(SIZES) for _ in range(chance.randrange(6))]
    elif kind == 4 and len(tensor.shape):
        tensor.shape[chance.randrange(len(tensor.shape))] = chance.choice(SIZES)
    elif kind == 5 and raws:
        index = chance.randrange(len(raws))
        raws[index] = raws[index][: chance.randrange(len(raws[index]) + 1)]
    elif kind == 6 and raws:
        index = chance.randrange(len(raws))
        raws[index] = flipped(raws[index], chance)
    elif kind == 7 and raws:
        raws.append(chance.randbytes(chance.randrange(100))) if chance.random() < 0.5 else raws.pop()
    elif kind == 8:
        name, value = chance.choice(list(TYPED.items()))
        getattr(tensor.contents, name).extend([value] * chance.choice([1, 2, 3, 128]))
        if chance.random() < 0.5:
            del raws[:]
    elif kind == 9:
        inputs.append(tensor)
        raws.append(b"" if not raws else raws[0])
    elif kind == 10:
        inputs.remove(tensor)
    elif kind == 11:
        request.parameters[chance.choice(["bits", "timeout", "digest", "x"])].CopyFrom(chance.choice(PARAMETERS))
    elif kind == 12:
        request.model_version = chance.choice(["0", "2", "-1", "1.0", "9" * 400, "١"])
    else:
        request.outputs.add(name=chance.choice(NAMES))


def flipped(content, chance):
    content = bytearray(content)
    for _ in range(chance.randrange(1, 4)):
        if content:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def fuzz(fuzzed, tries, seed):
    folder, server, caller = fuzzed
    chance, seeds, seen = random.Random(seed), seeds_of(folder), {}
    raw = caller.channel.unary_unary(METHODS["ModelInfer"].path, lambda x: x, METHODS["ModelInfer"].response.FromString)
    right = [outputs_of(caller.infer(each)) for each in seeds]
    for number in range(tries):
        request = type(seeds[0])()
        request.CopyFrom(chance.choice(seeds))
        for _ in range(chance.choice([1, 1, 1, 2, 4])):
            changed(request, chance)
        content, cut = request.SerializeToString(), False
        if chance.random() < 0.1:
            content, cut = flipped(content, chance), True
        try:
            raw(content, timeout=60)
            code, words = "OK", ""
        except grpc.RpcError as error:
            code = error.code().name
            words = error.details()
        # What is no message at all is refused by gRPC itself.
        assert code in MAY or (cut and "deserializing" in words), f"{number}: {code} {words}"
        seen[code] = seen.get(code, 0) + 1
        if number % 100 == 0:
            for each, answer in zip(seeds, right, strict=True):
                found = outputs_of(caller.infer(each))
                assert all(torch.equal(found[name], answer[name]) for name in answer if name != "error")
    assert server._batcher.waiting == 0
    assert server._handlers.idle(1)
    return seen


# Raw contents: none, empty, many, of a length in needless bytes, too long; then other fields, groups, and a name again.
TAILS = [b"", b"\x3a", b"\x3a\0" * 300, b"\x3a\x80\0", b"\x3a\x80\x80\x80\x80\0", b"\x3a\xff\xff\xff\xff\xff\1",
         b"\x40\1", b"\xba\0\1x", b"\x3b\x3c", b"\x0a\3net"]  # fmt: skip


def as_whole(content):
    """What protobuf itself makes of a request; ``None``: it refuses it."""
    try:
        return message("ModelInferRequest").FromString(content).SerializeToString(deterministic=True)
    except DecodeError:
        return None


def in_views(content):
    """What our reader makes of it, and whether it made views."""
    try:
        found = read(content)
    except DecodeError:
        return None, False
    if not isinstance(found, Request):
        return found.SerializeToString(deterministic=True), False
    found.message.raw_input_contents.extend(map(bytes, found.raw_input_contents))
    return found.message.SerializeToString(deterministic=True), True


def test_a_request_is_read_as_protobuf_reads_it_whatever_it_is(fuzzed):
    chance, seeds, viewed, refused = random.Random(11), seeds_of(fuzzed[0]), 0, 0
    for _ in range(4000):
        request = type(seeds[0])()
        request.CopyFrom(chance.choice(seeds))
        for _ in range(chance.choice([0, 1, 2])):
            changed(request, chance)
        content = request.SerializeToString()
        way = chance.randrange(5)
        if way == 0:
            content = flipped(content, chance)
        elif way == 1:
            content = content[: chance.randrange(len(content) + 1)]
        elif way == 2:
            content += b"".join(chance.choices(TAILS, k=2))
        elif way == 3:
            content = chance.randbytes(chance.randrange(30))
        wanted = as_whole(content)
        found, is_view = in_views(content)
        assert found == wanted, content
        viewed, refused = viewed + is_view, refused + (wanted is None)
    assert viewed > 1000
    assert refused > 500


def test_wrong_requests_get_a_status_and_right_ones_an_answer(fuzzed):
    seen = fuzz(fuzzed, 600, seed=0)
    assert seen["INVALID_ARGUMENT"] > 200
    assert seen["OK"] > 20


def test_megabytes_of_names_are_refused(fuzzed):
    _, _, caller = fuzzed
    request = request_of("net.tail", {})
    for number in range(3000):
        request.inputs.add(name=f"{number}" * 300)
    assert caller.status(request)[0] == "INVALID_ARGUMENT"
    for _ in range(3):
        request.inputs.extend(list(request.inputs))
    assert request.ByteSize() > 10 * 2**20
    assert caller.status(request)[0] == "RESOURCE_EXHAUSTED"  # longer than any request here can be


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_wrong_requests_leave_nothing_behind(fuzzed):
    fuzz(fuzzed, 2000, seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(fuzzed, 100_000, seed=2)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 50, f"the process has grown by {grown:.0f} MiB"
