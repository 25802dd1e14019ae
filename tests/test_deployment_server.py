"""A server of bundles: what it answers to any client of the protocol, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import torch
from google.protobuf import descriptor_pool

from cleave.deployment import (
    BundleError,
    Pipeline,
    Repository,
    ServingError,
    Side,
    build_policy,
    code_codec,
    export_bundle,
    load_bundle,
)
from cleave.deployment.bundle.versions import versions_of
from cleave.deployment.runtime.wire.protocol import FILE, message, written
from cleave.deployment.runtime.wire.tensors import add_input, declare_input

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
from .serving_client import Gate, outputs_of, request_of, serving, until

ROOT = Path(__file__).resolve().parent.parent
EXITS = {"confidence": 0.6, "patience": 1, "ensemble": 0.6}


def coded_bundle(folder, codec):
    torch.manual_seed(1)
    parts = [device_part(SampleDevice()), server_part()]
    return export_bundle(
        folder, parts, [edge("head", "tail", cut=codec)], input=INPUT, outputs=OUTPUTS, images=images()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Bundles of each codec, and of early exits on both sides."""
    folder = tmp_path_factory.mktemp("repository")
    for kind in ("fixed", "sample", "float", "whole"):
        make_bundle(folder / kind, kind)
    coded_bundle(folder / "sparse", code_codec("sparse", SHAPE, 5))
    coded_bundle(folder / "image", code_codec("tiled_png", SHAPE, 8))
    coded_bundle(folder / "zstd", code_codec("packed_zstd", SHAPE, 5))
    entropy = [edge("head", "tail", cut=entropy_codec())]
    export_bundle(folder / "entropy", entropy_parts(), entropy, input=INPUT, outputs=OUTPUTS, images=images())
    for kind, threshold in EXITS.items():
        policy = build_policy(kind, threshold, exits=3)
        settings = {"split": "layer1", "cascade": kind != "ensemble", "seed": 112 if kind != "ensemble" else 3}
        exit_bundle(folder / kind, policy, placements=("device", "server", "server"), **settings)
    return folder


@pytest.fixture(scope="module")
def caller(folder):
    repository = Repository(folder=folder)
    with serving(*(each for each in folder.iterdir() if each.name != "zstd"), repository=repository) as (_, caller):
        yield caller


def inputs_of(bundle, sent):
    """What a client writes into a request of payloads."""
    crossings = {each.tensor: each for each in bundle.manifest.route.crossings}
    found = {}
    for tensor, payloads in sent.payloads.items():
        if tensor == "layer1/logits":
            side = Side(bundle, "server")
            opened = side.envelopes[tensor, "server"].opened_all(payloads)
            found["before"] = crossings[tensor].codec.decode(opened)["z"]
        else:
            state = tensor not in crossings
            found[tensor if state else "payload"] = payloads
    return found


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fixed", "sample", "sparse", "image", "entropy", "float"])
def test_payloads_are_answered_as_a_pipeline_answers_them_bit_by_bit(kind, folder, caller):
    pipeline = Pipeline(load_bundle(folder / kind))
    for count in range(1, 9):
        expected = pipeline.run(images(count, seed=count))
        answer = caller.infer(request_of(f"{kind}.tail", {"payload": expected.payloads["cut"]}, id=f"a{count}"))
        assert (answer.id, answer.model_name, answer.model_version) == (f"a{count}", f"{kind}.tail", "1")
        assert torch.equal(outputs_of(answer)["logits"], expected.logits)


@pytest.mark.parametrize("kind", EXITS)
def test_exits_behind_the_link_answer_as_a_pipeline_does(kind, folder, caller):
    bundle = load_bundle(folder / kind)
    batch = exit_images(8, seed=4)
    expected = Pipeline(bundle).run(batch)
    sent = Side(bundle, "device").run(batch, request=0).messages["server"]
    inputs = inputs_of(bundle, sent)
    assert ("before" in inputs) == (kind != "ensemble")
    answer = outputs_of(caller.infer(request_of(f"{kind}.to_layer2", inputs)))
    rows = list(sent.rows)
    assert torch.equal(answer["exit"], expected.exits[rows])
    assert torch.equal(answer["logits"], expected.logits[rows])
    known = {each.name for each in caller("ModelMetadata", name=f"{kind}.to_layer2").inputs}
    assert inputs.keys() <= known


def test_another_width_is_asked_for_by_bits_or_by_levels(folder, caller):
    bundle = load_bundle(folder / "sample")
    for bits in (2, 7, 16):
        expected = Pipeline(bundle, bits=bits).run(images())
        request = request_of("sample.tail", {"payload": expected.payloads["cut"]}, {"bits": bits})
        assert torch.equal(outputs_of(caller.infer(request))["logits"], expected.logits)
    for bits, words in (
        (1, "bits must be"),
        (17, "bits must be"),
        (32, "means float"),
        (6, "7 bits, this side reads 6"),
    ):
        payloads = Pipeline(bundle, bits=7).run(images()).payloads["cut"]
        code, told = caller.status(request_of("sample.tail", {"payload": payloads}, {"bits": bits}))
        assert code == "INVALID_ARGUMENT"
        assert words in told


def parts_of(pipeline, batch):
    """What arrives at the tail, as tensors."""
    (crossing,) = pipeline.crossings.values()
    payloads = pipeline.run(batch).payloads["cut"]
    return crossing.codec.decode(pipeline.sides["server"].envelopes["cut", "server"].opened_all(payloads))


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("kind", ["fixed", "sample", "entropy", "float"])
def test_tensors_of_any_client_are_answered_likewise(kind, typed, folder, caller):
    pipeline = Pipeline(load_bundle(folder / kind))
    parts = parts_of(pipeline, images())
    if "levels" in parts:
        parts["levels"] = parts["levels"].reshape(1)
    if kind == "fixed":
        del parts["low"], parts["high"]  # all samples share them, so they may be left out
    request = request_of(f"{kind}.tail", parts)
    if typed:
        del request.raw_input_contents[:]
        for tensor in request.inputs:
            into = {"FP32": "fp32_contents", "INT32": "int_contents", "INT64": "int64_contents"}[tensor.datatype]
            getattr(tensor.contents, into).extend(parts[tensor.name].flatten().tolist())
    answer = caller.infer(request)
    assert torch.equal(outputs_of(answer)["logits"], pipeline.run(images()).logits)


def test_a_partition_behind_the_first_is_a_model_of_its_own(folder, caller):
    bundle = load_bundle(folder / "confidence")
    feature, before = torch.rand(3, 4, 6, 6), torch.rand(3, 4)
    expected = bundle.partitions["to_final"]({"layer2": feature, "layer2/logits": before})["logits"]
    answer = caller.infer(request_of("confidence.to_final", {"layer2": feature, "layer2/logits": before}))
    assert torch.equal(outputs_of(answer)["logits"], expected)


def test_a_whole_model_takes_images(folder, caller):
    answer = caller.infer(request_of("whole.all", {"images": images()}))
    assert torch.equal(outputs_of(answer)["logits"], Pipeline(load_bundle(folder / "whole")).run(images()).logits)


def test_a_service_that_is_called_sends_back_what_it_has_made(tmp_path):
    parts, edges = returning_parts()
    bundle = export_bundle(tmp_path / "linked", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    with serving(tmp_path / "linked", repository=Repository(placement="host")) as (_, caller):
        local = Side(bundle, "local")
        sent = local.run(images(), request=1).messages["host"]
        answer = outputs_of(caller.infer(request_of("linked.help", {"payload": sent.payloads["there"]})))
        assert answer["back@local"] == Pipeline(bundle).run(images()).payloads["back"]
    with pytest.raises(BundleError, match="local is entered 2 times for one request.*serve host instead"):
        Repository(placement="local").add(tmp_path / "linked")


def test_a_damaged_payload_concerns_its_sample_alone(folder, caller):
    pipeline = Pipeline(load_bundle(folder / "sample"))
    expected = pipeline.run(images())
    payloads = list(expected.payloads["cut"])
    payloads[2] = payloads[2][:-1] + b"\0\1"[payloads[2][-1] == 0 :][:1]
    answer = outputs_of(caller.infer(request_of("sample.tail", {"payload": payloads})))
    rest = [0, 1, 3, 4]
    assert torch.equal(answer["logits"][rest], pipeline.run(images()[rest]).logits)
    assert answer["logits"][2].isnan().all()
    assert [bool(text) for text in answer["error"]] == [False, False, True, False, False]
    assert b"payload 2" in answer["error"][2]
    code, words = caller.status(request_of("sample.tail", {"payload": [payloads[2]]}))
    assert code == "INVALID_ARGUMENT"
    assert "damaged" in words


def test_outputs_are_those_that_were_asked_for(folder, caller):
    payloads = Pipeline(load_bundle(folder / "fixed")).run(images()).payloads["cut"]
    request = request_of("fixed.tail", {"payload": payloads})
    request.outputs.add(name="logits")
    assert list(outputs_of(caller.infer(request))) == ["logits"]
    request.outputs.add(name="logit")
    assert "has no output 'logit'" in caller.status(request)[1]


# --- what is told -----------------------------------------------------------------------------------------------------


def test_the_server_and_its_models_tell_of_themselves(folder, caller):
    assert caller("ServerLive").live
    assert caller("ServerReady").ready
    assert caller("ServerMetadata").name == "cleave"
    assert caller("ModelReady", name="fixed.tail", version="1").ready
    assert not caller("ModelReady", name="fixed.tail", version="2").ready
    assert not caller("ModelReady", name="fixed.head").ready
    found = caller("ModelMetadata", name="sample.tail")
    described = {each.name: (each.datatype, list(each.shape)) for each in found.inputs}
    codes = {"codes": ("INT32", [-1, *SHAPE]), "low": ("FP32", [-1]), "high": ("FP32", [-1]), "levels": ("INT64", [1])}
    assert described == {"payload": ("BYTES", [-1]), **codes}
    assert found.properties["digest"] == load_bundle(folder / "sample").manifest.digest
    assert found.properties["max_batch_size"] == "8"
    assert list(found.versions) == ["1"]
    exits = {each.name: each.datatype for each in caller("ModelMetadata", name="patience.to_layer2").outputs}
    assert exits == {"logits": "FP32", "exit": "INT64", "error": "BYTES"}


def test_health_and_reflection_answer(caller):
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    health = health_pb2_grpc.HealthStub(caller.channel)
    for service in ("", "inference.GRPCInferenceService"):
        assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == 1
    stub = reflection_pb2_grpc.ServerReflectionStub(caller.channel)
    ask = reflection_pb2.ServerReflectionRequest
    (services,) = stub.ServerReflectionInfo(iter([ask(list_services="")]))
    names = {each.name for each in services.list_services_response.service}
    assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names
    for name in names:
        (found,) = stub.ServerReflectionInfo(iter([ask(file_containing_symbol=name)]))
        assert found.file_descriptor_response.file_descriptor_proto


def test_the_protocol_stays_out_of_protobufs_own_pool():
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindFileByName(FILE)
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")


@pytest.mark.parametrize("lengths", [[], [0], [127], [128, 1], [16383, 16384], [2**21 - 1, 2**21]])
def test_a_request_that_is_written_with_its_contents_is_the_message_that_holds_them(lengths):
    whole, alone = (request_of("net.tail", {}, {"digest": "a" * 64}) for _ in range(2))
    contents = {f"x{length}": [bytes([length % 251]) * length] * 2 for length in lengths}
    for name, content in contents.items():
        add_input(whole, name, content)
    parts = [declare_input(alone, name, content) for name, content in contents.items()]
    assert message("ModelInferRequest").FromString(written(alone, parts)) == whole


def test_grpc_is_imported_by_those_alone_who_serve():
    code = (
        "import sys, cleave.deployment as d; d.Pipeline; assert not {'grpc', 'google.protobuf'} & set(sys.modules); "
        "sys.modules['grpc'] = None\ntry: d.Server\nexcept ImportError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert "Server needs the extra `serve`: pip install grpcio protobuf" in told.stdout, told.stderr


# --- what is refused --------------------------------------------------------------------------------------------------


def wrong_requests(payloads):
    """Requests that are wrong by themselves, and a word of the answer."""
    good = lambda **fields: request_of("sample.tail", {"payload": payloads}, **fields)  # noqa: E731
    tensors = {"codes": torch.zeros(2, *SHAPE, dtype=torch.int32), "low": torch.zeros(2), "high": torch.ones(2)}

    def of(**changed):
        return request_of("sample.tail", {**tensors, **changed})

    def changed(change, request=None):
        request = good() if request is None else request
        change(request)
        return request

    huge = changed(lambda r: r.inputs[0].shape.__setitem__(0, 2**62))
    return {
        "no inputs": (message("ModelInferRequest")(model_name="sample.tail"), "lacks codes"),
        "an unknown input": (request_of("sample.tail", {"paylod": payloads}), "Did you mean 'payload'"),
        "an input twice": (
            changed(lambda r: (r.inputs.append(r.inputs[0]), r.raw_input_contents.append(b""))),
            "twice",
        ),
        "another datatype": (changed(lambda r: setattr(r.inputs[0], "datatype", "FP32")), "datatype BYTES, got 'FP32'"),
        "a huge batch": (huge, "a request may have 8"),
        "no samples": (request_of("sample.tail", {"payload": []}), r"shape [-1], got [0]"),
        "a negative batch": (changed(lambda r: r.inputs[0].shape.__setitem__(0, -1)), "got [-1]"),
        "too many dimensions": (changed(lambda r: r.inputs[0].shape.append(1)), "must have the shape"),
        "too few byte strings": (changed(lambda r: r.inputs[0].shape.__setitem__(0, 3)), "ends in front of 2"),
        "too many byte strings": (changed(lambda r: r.inputs[0].shape.__setitem__(0, 1)), "bytes more than its 1"),
        "a length that lies": (
            changed(lambda r: r.raw_input_contents.__setitem__(0, b"\xff" * 8)),
            "claims 4294967295",
        ),
        "a long payload": (request_of("sample.tail", {"payload": [b"\0" * 9000] * 2}), "have at most"),
        "raw and typed at once": (
            changed(lambda r: r.inputs[0].contents.bytes_contents.append(b"")),
            "by raw_input_contents and by contents",
        ),
        "typed of another kind": (
            changed(lambda r: (r.raw_input_contents.pop(), r.inputs[0].contents.int_contents.append(1))),
            "int_contents holds 1 values",
        ),
        "other sizes": (of(codes=torch.zeros(2, 4, 4, 5, dtype=torch.int32)), "must have the shape"),
        "other counts": (of(low=torch.zeros(1)), "as many samples"),
        "a code too large": (of(codes=torch.full((2, *SHAPE), 32, dtype=torch.int32)), "codes must be 0 to 31"),
        "a negative code": (of(codes=torch.full((2, *SHAPE), -1, dtype=torch.int32)), "codes must be 0 to 31"),
        "a range of NaN": (of(low=torch.full((2,), torch.nan)), "low and high must be finite and rise"),
        "a falling range": (of(low=torch.full((2,), 2.0)), "low and high must be finite and rise"),
        "levels that are none": (of(levels=torch.tensor([5])), "levels must be 2 to the power"),
        "short raw content": (
            changed(lambda r: r.raw_input_contents.__setitem__(1, b"\0"), of()),
            "has 8 bytes, got 1",
        ),
        "bits that are text": (request_of("sample.tail", {"payload": payloads}, {"bits": "four"}), "must be a whole"),
        "a negative timeout": (request_of("sample.tail", {"payload": payloads}, {"timeout": -1}), "microseconds"),
    }


def test_a_wrong_request_is_told_what_is_wrong_and_a_right_one_is_answered_after_it(folder, caller):
    payloads = Pipeline(load_bundle(folder / "sample")).run(images(2)).payloads["cut"]
    for name, (request, words) in wrong_requests(payloads).items():
        code, told = caller.status(request)
        assert code == "INVALID_ARGUMENT", f"{name}: {code} {told}"
        assert words in told, f"{name}: {told}"
    assert caller.status(request_of("sample.tail", {"payload": payloads})) == ("OK", "")


def test_a_width_that_a_codec_has_not_is_told(folder, caller):
    for kind, bits, words in (
        *(("sample", bits, "bits must be 2 to 16") for bits in (0, 1, -3, 17, 2**40)),
        ("float", 4, "without a quantiser: bits must stay 32, got 4"),
        ("entropy", 4, "bits"),
        ("sample", 7, "payload 0 was made at 5 bits, this side reads 7 bits"),
    ):
        payloads = Pipeline(load_bundle(folder / kind)).run(images(2)).payloads["cut"]
        code, told = caller.status(request_of(f"{kind}.tail", {"payload": payloads}, {"bits": bits}))
        assert code == "INVALID_ARGUMENT", f"{kind} {bits}: {code} {told}"
        assert words in told


def test_unknown_models_and_versions_are_named(caller):
    code, words = caller.status(request_of("fixd.tail", {"payload": [b""]}))
    assert code == "NOT_FOUND"
    assert "there is no model 'fixd.tail'" in words
    assert "Did you mean 'fixed.tail'" in words
    code, words = caller.status(request_of("fixed.tail", {"payload": [b""]}, model_version="7"))
    assert (code, words) == ("NOT_FOUND", "fixed.tail has no version '7'; it has 1")


def test_a_client_of_another_bundle_is_told_both_digests(folder, caller):
    request = request_of("fixed.tail", {"payload": [b""]}, {"digest": "ab" * 32})
    code, words = caller.status(request)
    assert code == "FAILED_PRECONDITION"
    assert "ab" * 32 in words
    assert load_bundle(folder / "fixed").manifest.digest in words


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_answers_each_request_once_and_says_what_is_wrong_with_which(folder, caller):
    pipeline = Pipeline(load_bundle(folder / "sample"))
    expected = {str(n): pipeline.run(images(1 + n % 3, seed=n)) for n in range(40)}
    requests = [request_of("sample.tail", {"payload": x.payloads["cut"]}, id=name) for name, x in expected.items()]
    requests.insert(7, request_of("nobody", {}, id="wrong"))
    answers = list(caller.stub("ModelStreamInfer")(iter(requests), timeout=60))
    assert sorted(each.infer_response.id for each in answers) == sorted([*expected, "wrong"])
    for each in answers:
        name = each.infer_response.id
        if name == "wrong":
            assert "there is no model 'nobody'" in each.error_message
            assert each.infer_response.parameters["status"].string_param == "NOT_FOUND"
        else:
            # Batches that several requests share differ from one alone in the last bits.
            torch.testing.assert_close(outputs_of(each.infer_response)["logits"], expected[name].logits)


# --- the repository ---------------------------------------------------------------------------------------------------


def test_bundles_are_loaded_and_unloaded_by_name_alone(folder, caller):
    def state():
        return {each.name: each.state for each in caller("RepositoryIndex").models if each.name.startswith("zstd")}

    assert state() == {"zstd": "UNAVAILABLE"}
    caller("RepositoryModelLoad", model_name="zstd")
    expected = Pipeline(load_bundle(folder / "zstd")).run(images())
    request = request_of("zstd.tail", {"payload": expected.payloads["cut"]})
    assert torch.equal(outputs_of(caller.infer(request))["logits"], expected.logits)
    assert state() == {"zstd.tail": "READY"}
    assert "zstd.tail" in {each.name for each in caller("RepositoryIndex", ready=True).models}
    caller("RepositoryModelUnload", model_name="zstd.tail")
    assert caller.status(request)[0] == "NOT_FOUND"
    assert state() == {"zstd": "UNAVAILABLE"}
    caller("RepositoryModelLoad", model_name="zstd.tail")  # a model's name finds its bundle
    caller("RepositoryModelUnload", repository_name="zstd")  # as KServe's own definition spells it
    for name in ("../zstd", "/etc", "zstd/..", "", ".", "x" * 5000, str(folder / "zstd")):
        with pytest.raises(grpc.RpcError, match="must be a plain name") as error:
            caller("RepositoryModelLoad", model_name=name)
        assert error.value.code().name == "INVALID_ARGUMENT"
    with pytest.raises(grpc.RpcError, match="the repository has no bundle 'zstandard'"):
        caller("RepositoryModelLoad", model_name="zstandard")


def test_a_bundle_is_verified_before_it_is_served(folder, tmp_path):
    shutil.copytree(folder / "fixed", tmp_path / "good")
    shutil.copytree(folder / "fixed", tmp_path / "bad")
    (tmp_path / "bad" / "tail.pt").write_bytes(b"damaged")
    (tmp_path / "link").symlink_to(folder / "fixed")
    shutil.copytree(folder / "fixed", tmp_path / "newer")
    manifest = tmp_path / "newer" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": 99}))
    newer = "newer cannot be served: .*has schema 99, .*: update Cleave, or export it with this version"
    with serving(tmp_path / "good", repository=Repository(folder=tmp_path)) as (_, caller):
        for name, words in (("bad", "tail.pt has 7 bytes"), ("link", "has no bundle 'link'"), ("newer", newer)):
            with pytest.raises(grpc.RpcError, match=words):
                caller("RepositoryModelLoad", model_name=name)
        assert [each.name for each in caller("RepositoryIndex", ready=True).models] == ["good.tail"]
        shutil.copy(tmp_path / "bad" / "tail.pt", tmp_path / "good" / "tail.pt")
        with pytest.raises(grpc.RpcError, match="tail.pt has 7 bytes"):
            caller("RepositoryModelLoad", model_name="good")
        assert caller("ModelReady", name="good.tail").ready  # what was served still is


def test_without_a_repository_nothing_comes_or_goes(folder):
    with serving(folder / "fixed") as (_, caller):
        for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
            with pytest.raises(grpc.RpcError, match="started without a repository"):
                caller(method, model_name="fixed")
        assert caller("ModelReady", name="fixed.tail").ready


def test_versions_are_folders_and_the_newest_answers(folder, tmp_path):
    for version in (2, 10):
        shutil.copytree(folder / ("fixed" if version == 2 else "sample"), tmp_path / "net" / str(version))
    assert versions_of(tmp_path / "net" / "2") == ("net", {2: tmp_path / "net" / "2"})
    with serving(tmp_path / "net") as (_, caller):
        assert list(caller("ModelMetadata", name="net.tail").versions) == ["2", "10"]
        digests = [caller("ModelMetadata", name="net.tail", version=x).properties["digest"] for x in ("2", "10", "")]
    assert digests[0] == load_bundle(folder / "fixed").manifest.digest
    assert digests[1] == digests[2] == load_bundle(folder / "sample").manifest.digest


def test_two_bundles_of_one_name_and_version_are_refused_and_others_are_versions(folder, tmp_path):
    for place, kind in (("a/net", "fixed"), ("b/net", "sample"), ("c/net/2", "sample"), ("d/net/1", "sample")):
        shutil.copytree(folder / kind, tmp_path / place)
    repository = Repository()
    repository.add(tmp_path / "a/net")
    for other in ("b/net", "a/net", "d/net", "d/net/1"):
        with pytest.raises(BundleError, match=r"and .*a/net are both version 1 of net; give one of them another"):
            repository.add(tmp_path / other)
    repository.add(tmp_path / "c/net")
    assert repository.versions("net.tail") == [1, 2]
    with pytest.raises(BundleError, match=r"c/net holds versions 2; name one of them: .*c/net/2"):
        load_bundle(tmp_path / "c/net")


def test_what_is_not_loaded_is_listed_in_all_its_versions(folder, tmp_path):
    for version in (1, 3):
        shutil.copytree(folder / "fixed", tmp_path / "net" / str(version))
    with serving(repository=Repository(folder=tmp_path)) as (_, caller):
        listed = [(each.name, each.version, each.state) for each in caller("RepositoryIndex").models]
        assert listed == [("net", "1", "UNAVAILABLE"), ("net", "3", "UNAVAILABLE")]
        caller("RepositoryModelLoad", model_name="net")
        listed = [(each.name, each.version, each.state) for each in caller("RepositoryIndex").models]
        assert listed == [("net.tail", "1", "READY"), ("net.tail", "3", "READY")]


def test_what_cannot_be_served_is_named(folder, tmp_path):
    with pytest.raises(BundleError, match="no bundle: neither it nor a folder 1, 2"):
        Repository().add(tmp_path)
    with pytest.raises(BundleError, match="this bundle has no placement 'sever'.*Did you mean 'server'"):
        Repository(placement="sever").add(folder / "fixed")
    parts, edges = returning_parts()
    export_bundle(tmp_path / "linked", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    words = "local is entered 2 times for one request, .*; serve host instead, and let local call it"
    with pytest.raises(BundleError, match=words):
        Repository(placement="local").add(tmp_path / "linked")
    with pytest.raises(ValueError, match="repository=.* is no folder"):
        Repository(folder=tmp_path / "nowhere")
    with pytest.raises(ServingError, match="there is no model 'x'; served is nothing"):
        Repository().get("x")


def test_running_requests_end_on_what_they_began_with(folder, tmp_path):
    shutil.copytree(folder / "fixed", tmp_path / "net")
    expected = Pipeline(load_bundle(folder / "fixed")).run(images())
    with serving(tmp_path / "net", repository=Repository(folder=tmp_path)) as (server, caller):
        gate = Gate(server.repository.get("net.tail"))
        call = caller.stub("ModelInfer").future(
            request_of("net.tail", {"payload": expected.payloads["cut"]}), timeout=60
        )
        until(gate.reached.is_set)
        caller("RepositoryModelUnload", model_name="net")
        assert not caller("ModelReady", name="net.tail").ready
        gate.open.set()
        assert torch.equal(outputs_of(call.result())["logits"], expected.logits)
