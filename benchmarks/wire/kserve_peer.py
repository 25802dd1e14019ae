"""KServe's own server and client, run by the Python of an environment that has KServe (benchmarks/serving-peers.txt).

    python kserve_peer.py serve PORT MODEL [PARTITION]   answers until it is killed
    python kserve_peer.py ask ADDRESS MODEL FILE COUNT [PARTITION]   asks once for each line that comes, and prints its
                                                         milliseconds; first those of the model without a wire

FILE holds a payload; COUNT is how many samples of floats it is, 0 for bytes. PARTITION is a TorchScript file, for which
the environment needs torch too; without one the model reads ten numbers, whatever came.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferOutput, InferRequest, InferResponse, Model, ModelServer

SHAPE = (64, 56, 56)


class Tail(Model):  # type: ignore[misc]
    """Does next to nothing, or runs a partition."""

    def __init__(self, name: str, partition: str | None) -> None:
        super().__init__(name)
        self.partition = None
        if partition is not None:
            import torch

            torch.set_num_threads(1)
            self.torch, self.partition = torch, torch.jit.load(partition)
        self.ready = True

    async def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        array = payload.inputs[0].as_numpy()
        if array.dtype == np.object_:
            array = np.frombuffer(array[0], np.uint8)[None].astype(np.float32)
        if self.partition is not None:
            with self.torch.inference_mode():
                found = self.partition(self.torch.from_numpy(np.array(array))).numpy()
        else:
            found = np.ascontiguousarray(array.reshape(len(array), -1)[:, :10])
        output = InferOutput("logits", list(found.shape), "FP32")
        output.set_data_from_numpy(found, binary_data=True)
        return InferResponse(payload.id or "", self.name, [output])


async def ask(address: str, model: str, file: str, count: int, partition: str | None) -> None:
    payload = Path(file).read_bytes()
    if count:
        name, array, kind = "z", np.frombuffer(payload, np.float32).reshape(count, *SHAPE), "FP32"
    else:
        name, array, kind = "payload", np.array([payload], np.object_), "BYTES"
    client, own = InferenceGRPCClient(url=address), Tail(model, partition)
    loop = asyncio.get_running_loop()

    def request() -> InferRequest:
        given = InferInput(name, list(array.shape), kind)
        given.set_data_from_numpy(array, binary_data=True)
        return InferRequest(model_name=model, infer_inputs=[given])

    spent = []
    for _ in range(100):
        asked, start = request(), time.perf_counter()
        await own.predict(asked)
        spent.append(1000 * (time.perf_counter() - start))
    print("ready", sorted(spent)[len(spent) // 2], flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        start = time.perf_counter()
        answer = await client.infer(request())
        (logits,) = [each.as_numpy() for each in answer.outputs if each.name == "logits"]
        print(1000 * (time.perf_counter() - start), logits.shape, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        port, model = int(sys.argv[2]), Tail(sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else None)
        ModelServer(http_port=port + 1, grpc_port=port, workers=1, enable_latency_logging=False).start([model])
    else:
        asyncio.run(ask(*sys.argv[2:5], int(sys.argv[5]), sys.argv[6] if len(sys.argv) > 6 else None))
