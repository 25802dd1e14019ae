"""tritonclient and KServe's client, unchanged and in an environment of their own, ask our server."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from cleave.deployment import Pipeline, Repository, load_bundle

from .deployment_networks import images, make_bundle
from .serving_client import serving

PEERS = os.environ.get("CLEAVE_PEERS", "")

TRITON = """
import json, sys
import numpy as np
import tritonclient.grpc as triton

port, tensors = sys.argv[1], json.loads(sys.argv[2])
client = triton.InferenceServerClient(f"127.0.0.1:{port}")
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("net.tail")
assert client.get_server_metadata().name == "cleave"
assert client.get_model_metadata("net.tail").inputs[0].name == "payload"

def inputs():
    found = []
    for name, (datatype, values) in tensors.items():
        array = np.array(values, {"INT32": np.int32, "FP32": np.float32}[datatype])
        found.append(triton.InferInput(name, list(array.shape), datatype))
        found[-1].set_data_from_numpy(array)
    return found

logits = client.infer("net.tail", inputs(), request_id="one").as_numpy("logits")
payload = triton.InferInput("payload", [2], "BYTES")
payload.set_data_from_numpy(np.array([bytes.fromhex(each) for each in json.loads(sys.argv[3])], dtype=np.object_))
assert (client.infer("net.tail", [payload]).as_numpy("logits") == logits).all()
answers = []
client.start_stream(lambda result, error: answers.append((result, error)))
for number in range(5):
    client.async_stream_infer("net.tail", inputs(), request_id=str(number))
client.stop_stream()
assert sorted(result.get_response().id for result, error in answers) == list("01234"), answers
names = {model.name: model.state for model in client.get_model_repository_index().models}
assert names == {"net.tail": "READY", "other": "UNAVAILABLE"}, names
client.load_model("other")
assert client.is_model_ready("other.tail")
client.unload_model("other.tail")
assert not client.is_model_ready("other.tail")
print(json.dumps(logits.tolist()))
"""

KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferInput, InferRequest, InferenceGRPCClient

async def ask(port, tensors):
    client = InferenceGRPCClient(url=f"127.0.0.1:{port}")
    assert await client.is_server_ready()
    inputs = []
    for name, (datatype, values) in tensors.items():
        array = np.array(values, {"INT32": np.int32, "FP32": np.float32}[datatype])
        inputs.append(InferInput(name=name, shape=list(array.shape), datatype=datatype))
        inputs[-1].set_data_from_numpy(array, binary_data=True)
    answer = await client.infer(InferRequest(model_name="net.tail", infer_inputs=inputs))
    (logits,) = [each for each in answer.outputs if each.name == "logits"]
    print(json.dumps(logits.as_numpy().tolist()))

asyncio.run(ask(sys.argv[1], json.loads(sys.argv[2])))
"""


def has(package):
    """Whether the environment of the peers has a package."""
    if not PEERS:
        return False
    return subprocess.run([PEERS, "-c", f"import {package}"], capture_output=True, timeout=100).returncode == 0


CODES = {"tritonclient": TRITON, "kserve": KSERVE}


@pytest.mark.parametrize("peer", CODES)
def test_a_peer_asks_and_is_answered(peer, tmp_path):
    if not has(peer):
        pytest.skip(f"{peer} is not in CLEAVE_PEERS={PEERS or '(unset)'}; see benchmarks/serving-peers.txt")
    for name in ("net", "other"):
        make_bundle(tmp_path / name, "sample")
    pipeline = Pipeline(load_bundle(tmp_path / "net"))
    expected = pipeline.run(images(2))
    (crossing,) = pipeline.crossings.values()
    payloads = expected.payloads["cut"]
    opened = pipeline.sides["server"].envelopes["cut", "server"].opened_all(payloads)
    parts = crossing.codec.decode(opened)
    kinds = {"codes": "INT32", "low": "FP32", "high": "FP32"}
    tensors = json.dumps({name: (kind, parts[name].tolist()) for name, kind in kinds.items()})
    with serving(tmp_path / "net", repository=Repository(folder=tmp_path)) as (server, _):
        command = [PEERS, "-c", CODES[peer], str(server.port), tensors, json.dumps([each.hex() for each in payloads])]
        told = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert told.returncode == 0, told.stderr[-3000:]
    assert torch.equal(torch.tensor(json.loads(told.stdout.splitlines()[-1])), expected.logits)
