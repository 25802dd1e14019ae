"""What is wrong with one sample of a batch does not stop the others, and is told by its row."""

import math

import pytest
import torch

from cleave.deployment import (
    ENVELOPE_BYTES,
    BundleError,
    CodecError,
    FloatCodec,
    Message,
    Outcome,
    PayloadError,
    Pipeline,
    Result,
    Side,
    UniformCodec,
    build_policy,
    code_codec,
    export_bundle,
)

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
    make_parts,
    returning_parts,
    server_part,
)


def bundle_of(folder, coding, envelope):
    if coding == "entropy":
        torch.manual_seed(0)
        codec, parts = entropy_codec(), entropy_parts()
    else:
        parts, _ = make_parts("float" if coding == "float" else "sample")
        codec = FloatCodec(SHAPE) if coding == "float" else code_codec(coding, SHAPE, 5)
    more = {"input": INPUT, "outputs": OUTPUTS, "images": images(), "envelope": envelope}
    return export_bundle(folder, parts, [edge("head", "tail", cut=codec)], **more)


def damaged(message, places, damage=lambda payload: payload[:-1], tensor="cut"):
    payloads = [damage(p) if i in places else p for i, p in enumerate(message.payloads[tensor])]
    return Message(message.rows, {**message.payloads, tensor: payloads})


DAMAGES = {
    "cut short": lambda payload: payload[:-1],
    "empty": lambda payload: b"",
    "longer": lambda payload: payload + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("envelope", [True, False])
@pytest.mark.parametrize("coding", ["packed", "sparse", "tiled_png", "tiled_webp", "packed_zstd", "float", "entropy"])
def test_one_bad_payload_leaves_the_others_alone(tmp_path, coding, envelope, damage):
    bundle = bundle_of(tmp_path / "bundle", coding, envelope)
    device, server = Side(bundle, "device"), Side(bundle, "server")
    message = device.run(images(), request=0).messages["server"]
    expected = server.run(message, request=0).outputs["logits"]
    message_of = "2 of the samples failed, those of rows 1, 4; .* Row 1: .*payload 1"
    with pytest.raises(PayloadError, match=message_of) as caught:
        server.run(damaged(message, (1, 4), DAMAGES[damage]), request=0)
    error = caught.value
    assert isinstance(error, CodecError)
    assert list(error.errors) == [1, 4]
    assert "payload 4" in str(error.errors[4])
    assert isinstance(error.outcome, Outcome)
    assert error.outcome.rows == (0, 2, 3)
    torch.testing.assert_close(error.outcome.outputs["logits"], expected[[0, 2, 3]])
    assert server.waiting == ()


@pytest.mark.parametrize("count", [1, 3])
def test_where_all_payloads_are_bad_nothing_runs(tmp_path, count):
    bundle = make_bundle(tmp_path / "bundle")
    message = Side(bundle, "device").run(images(count), request=0).messages["server"]
    server = Side(bundle, "server")
    with pytest.raises(PayloadError) as caught:
        server.run(damaged(message, range(count)), request=0)
    assert list(caught.value.errors) == list(range(count))
    outcome = caught.value.outcome
    assert (outcome.rows, outcome.outputs, outcome.messages, outcome.part_seconds) == ((), {}, {}, {})
    assert server.waiting == ()


def test_rows_are_those_of_the_request(tmp_path):
    """After exits the places in a message are not the rows of the request."""
    policy = build_policy("confidence", 0.6, exits=3)
    bundle = exit_bundle(tmp_path / "bundle", policy, placements=("device", "edge", "cloud"), seed=3)
    device, edge_side = Side(bundle, "device"), Side(bundle, "edge")
    message = device.run(exit_images(40, seed=4), request=0).messages["edge"]
    assert message.rows != tuple(range(len(message.rows)))
    with pytest.raises(PayloadError) as caught:
        edge_side.run(damaged(message, (2,), tensor="layer1"), request=0)
    row = message.rows[2]
    assert list(caught.value.errors) == [row]
    assert f"payload {row} " in str(caught.value.errors[row])
    sound = edge_side.run(message, request=1)
    outcome = caught.value.outcome
    assert outcome.rows == tuple(each for each in sound.rows if each != row)
    assert outcome.messages["cloud"].rows == tuple(each for each in sound.messages["cloud"].rows if each != row)
    cloud = Side(bundle, "cloud")
    torch.testing.assert_close(
        cloud.run(outcome.messages["cloud"], request=0).outputs["logits"],
        cloud.run(Message(*after_dropping(sound.messages["cloud"], row)), request=1).outputs["logits"],
    )


def after_dropping(message, row):
    places = [place for place, each in enumerate(message.rows) if each != row]
    payloads = {name: [each[place] for place in places] for name, each in message.payloads.items()}
    return tuple(message.rows[place] for place in places), payloads


@pytest.mark.parametrize("tensor", ["layer1", "layer1/answered", "layer1/agreed"])
def test_a_sample_fails_with_any_of_its_tensors(tmp_path, tensor):
    policy = build_policy("patience", 1, exits=3)
    bundle = exit_bundle(tmp_path / "bundle", policy, placements=("device", "edge", "cloud"), seed=3)
    message = Side(bundle, "device").run(exit_images(), request=0).messages["edge"]
    with pytest.raises(PayloadError) as caught:
        Side(bundle, "edge").run(damaged(message, (0,), tensor=tensor), request=0)
    assert list(caught.value.errors) == [message.rows[0]]
    outcome = caught.value.outcome
    assert message.rows[0] not in {*outcome.rows, *(r for m in outcome.messages.values() for r in m.rows)}


def test_a_failed_sample_is_dropped_from_what_waits(tmp_path):
    parts, edges = returning_parts()
    bundle = export_bundle(tmp_path / "bundle", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    local, host = Side(bundle, "local"), Side(bundle, "host")
    expected = Pipeline(bundle).run(images()).logits
    back = host.run(local.run(images(), request=0).messages["host"], request=0).messages["local"]
    with pytest.raises(PayloadError) as caught:
        local.run(damaged(back, (3,), tensor="back"), request=0)
    assert caught.value.outcome.rows == (0, 1, 2, 4)
    torch.testing.assert_close(caught.value.outcome.outputs["logits"], expected[[0, 1, 2, 4]])
    assert local.waiting == ()


def test_what_concerns_the_whole_message_is_refused_whole(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    message = Side(bundle, "device").run(images(), request=0).messages["server"]
    server = Side(bundle, "server")
    with pytest.raises(BundleError, match="cut has 4 payloads for 5 samples"):
        server.run(Message(message.rows, {"cut": message.payloads["cut"][1:]}), request=0)
    assert server.run(message, request=0).rows == message.rows


# --- encoding -----------------------------------------------------------------------------------------------------


class Sometimes(SampleDevice):
    """Emits a range that cannot be sent of pictures that are black all over."""

    def forward(self, images, levels):
        codes, low, high = super().forward(images, levels)
        return codes, torch.where(images.flatten(1).amax(1) == 0, torch.tensor(math.nan), low), high


@pytest.fixture
def sometimes(tmp_path):
    torch.manual_seed(0)
    edges = [edge("head", "tail", cut=UniformCodec(SHAPE, 4))]
    more = {"input": INPUT, "outputs": OUTPUTS, "images": images()}
    return export_bundle(tmp_path / "bundle", [device_part(Sometimes()), server_part()], edges, **more)


def with_black(*rows):
    batch = images(seed=2)
    batch[list(rows)] = 0
    return batch


def test_a_sample_that_cannot_be_encoded_leaves_the_others_alone(sometimes):
    device = Side(sometimes, "device")
    with pytest.raises(PayloadError, match="Row 2: the range of sample 2 must be finite") as caught:
        device.run(with_black(2), request=0)
    message = caught.value.outcome.messages["server"]
    assert message.rows == (0, 1, 3, 4)
    sound = device.run(images(seed=2), request=1).messages["server"]
    assert message.payloads["cut"] == [sound.payloads["cut"][row] for row in message.rows]
    assert device.waiting == ()


def test_a_pipeline_tells_errors_by_sample_and_keeps_the_other_results(sometimes):
    pipeline = Pipeline(sometimes)
    expected = pipeline.run(images(seed=2))
    with pytest.raises(PayloadError) as caught:
        pipeline.run(with_black(0, 3))
    result = caught.value.outcome
    assert list(caught.value.errors) == [0, 3]
    assert isinstance(result, Result)
    assert result.logits.isnan().all(1).tolist() == [True, False, False, True, False]
    torch.testing.assert_close(result.logits[[1, 2, 4]], expected.logits[[1, 2, 4]])
    assert [len(payload) > 0 for payload in result.payloads["cut"]] == [False, True, True, False, True]
    with pytest.raises(PayloadError) as caught:
        pipeline.run(with_black(0, 1, 2, 3, 4))
    assert caught.value.outcome.logits.isnan().all()
    assert pipeline.run(images(seed=2)).payloads == expected.payloads


def test_a_pipeline_marks_the_exit_of_a_sample_that_failed(tmp_path):
    bundle = exit_bundle(tmp_path / "bundle", None, placements=("device", "device", "server"))
    batch = exit_images(30, seed=4)
    expected = Pipeline(bundle).run(batch)
    codec = bundle.manifest.route.codecs["layer2"]
    bodies = [payload[ENVELOPE_BYTES:] for payload in expected.payloads["layer2"]]
    most = codec.decode(bodies)["z"].flatten(1)[:, 0].median()

    class Dropping(FloatCodec):
        """A link that loses the payloads of maps that begin with a large value."""

        def decode(self, payloads):
            found = super().decode(payloads)
            if (large := found["z"].flatten(1)[:, 0] > most).any():
                raise CodecError(f"payload {int(large.nonzero()[0])} was lost")
            return found

    with pytest.raises(PayloadError, match="was lost") as caught:
        Pipeline(bundle, codecs={"layer2": Dropping(codec.shape)}).run(batch)
    failed = sorted(caught.value.errors)
    assert len(failed) == 15
    result = caught.value.outcome
    assert [row for row, exit in enumerate(result.exits.tolist()) if exit == -1] == failed
    others = [row for row in range(30) if row not in failed]
    torch.testing.assert_close(result.logits[others], expected.logits[others])
