"""What the runtime costs: ``Pipeline.run`` against the bundle's partitions alone, called one after another.

The bundle is that of ``experiment=digits_hnd``, untrained, or any other by ``--bundle``. Each run of the pipeline is
followed by one of the raw partitions, so that both meet the machine in the same state; what the pipeline adds is
checks, codecs, payloads and times. Prints the ratio pair by pair, for a batch of 1 and of 64.

    python benchmarks/pipeline_overhead.py [--bundle DIR] [--pairs 1000] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from cleave.architectures import create_backbone, split_network
from cleave.datamodules import Digits
from cleave.deployment import Bundle, Pipeline, load_bundle
from cleave.scripts.assembly.bundling import write_bundle

TARGETS = {1: 1.4, 64: 1.15}


def make_bundle(folder: Path) -> Path:
    """Export the network of digits_hnd as it is before training, with ranges observed on a few images."""
    torch.manual_seed(0)
    backbone = create_backbone("cifar", "resnet20", num_classes=10, in_channels=1)
    data = Digits(image_size=8)
    data.configure_input(backbone.input)
    data.setup("test")
    images = data.input.normalize(data.sample_batch("test", 64)["images"])
    bottleneck, codec = {"channels": 4, "width": 32}, {"bits": 4}
    network = split_network(backbone.network, "layer2", images, bottleneck=bottleneck, codec=codec)
    network.train()
    with torch.no_grad():
        network(images)
    return write_bundle(network, data, folder, config={}, metrics={})


def raw(bundle: Bundle, images: Tensor) -> None:
    """Run the partitions alone, on tensors that are handed over."""
    route = bundle.manifest.route
    known = {**route.settings, route.input: images}
    with torch.inference_mode():
        for name in route.order:
            partition = bundle.partitions[name]
            result = partition.module(*[known[item.name] for item in partition.spec.inputs])
            results = result if isinstance(result, tuple) else (result,)
            known.update(zip([item.name for item in partition.spec.outputs], results, strict=True))


def pairs(bundle: Bundle, batch: int, count: int, warmup: int) -> list[tuple[float, float]]:
    """Seconds of the pipeline and of the partitions alone, by turns."""
    route = bundle.manifest.route
    sample = bundle.samples[route.entry][route.input]
    images = sample[torch.arange(batch) % len(sample)].contiguous()
    pipeline, found = Pipeline(bundle), []
    # One thread's own time does not count what else the machine has to do meanwhile.
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(warmup + count):
        start = now()
        pipeline.run(images)
        middle = now()
        raw(bundle, images)
        found.append((middle - start, now() - middle))
    return found[warmup:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="a bundle without early exits; by default digits_hnd's, untrained")
    parser.add_argument("--pairs", type=int, default=1000, help="for a batch of 1; a quarter as many for 64")
    parser.add_argument("--warmup", type=int, default=20, help="pairs left out at the start")
    parser.add_argument("--threads", type=int, default=1, help="with one, its CPU time is taken, else the clock's")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        bundle = load_bundle(arguments.bundle or make_bundle(Path(folder) / "bundle"))
        if bundle.manifest.exits:
            parser.error("--bundle has early exits, at which samples leave: the partitions alone would do other work")
        print(f"torch {torch.__version__}, {arguments.threads} threads")
        for batch, target in TARGETS.items():
            count = arguments.pairs if batch == 1 else max(1, arguments.pairs // 4)
            timed = pairs(bundle, batch, count, arguments.warmup)
            ratios = sorted(whole / alone for whole, alone in timed)
            median, quarter = statistics.median(ratios), len(ratios) // 4
            missed |= median > target
            print(f"batch {batch}, {len(timed)} pairs")
            print(f"  Pipeline.run:     median {1e3 * statistics.median(whole for whole, _ in timed):.3f} ms")
            print(f"  partitions alone: median {1e3 * statistics.median(alone for _, alone in timed):.3f} ms")
            print(f"  ratio: median {median:.3f}, quartiles {ratios[quarter]:.3f} to {ratios[-quarter - 1]:.3f}")
            print(f"  target: at most {target}: {'missed' if median > target else 'met'}")
    sys.exit(missed)


if __name__ == "__main__":
    main()
