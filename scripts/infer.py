"""Run a bundle on images: device part → bytes → server part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor

from datamodules import Digits
from deployment import Bundle, Pipeline, Result, load_bundle
from scripts.terminal import CONF, console, friendly, start, table

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def infer(cfg: DictConfig) -> list[str]:
    """Run what the config describes, print it, and return the predicted class names."""
    bundle = load_bundle(cfg.bundle, device=cfg.device)
    pipeline = Pipeline(bundle, bits=cfg.bits)
    names, images, labels = read_input(cfg, pipeline)
    rows: list[tuple[str, ...]] = []
    predicted: list[str] = []
    payload_bytes: list[int] = []
    seconds: dict[str, float] = {}
    # TorchScript profiles its first two runs and compiles; that is not what a device would measure.
    for _ in range(3):
        pipeline.run(images[: cfg.batch_size])
    for batch in images.split(cfg.batch_size):
        result = pipeline.run(batch)
        payload_bytes += result.payload_bytes
        for part, spent in timings(bundle, result):
            seconds[part] = seconds.get(part, 0.0) + spent
        for confidence, index in zip(*(v.tolist() for v in result.logits.softmax(1).max(1)), strict=True):
            i = len(predicted)
            predicted.append(bundle.class_names[index])
            label = labels[i] if labels else ""
            rows.append((names[i], predicted[i], label, f"{confidence:.3f}", f"{payload_bytes[i]:,}"))
    table(
        f"{len(rows)} images through {cfg.bundle}",
        rows,
        ("image", "prediction", "label", "confidence", "payload bytes"),
    )
    per_image = [(part, f"{1000 * spent / len(rows):.3f}") for part, spent in seconds.items()]
    table(f"Milliseconds per image, batches of {min(cfg.batch_size, len(rows))}", per_image)
    return predicted


def timings(bundle: Bundle, result: Result) -> Iterator[tuple[str, float]]:
    """Seconds of each partition and of the codec after it, in the order of the route."""
    for i, (name, spent) in enumerate(result.part_seconds.items()):
        yield f"{name} partition", spent
        if i < len(result.encode_seconds):
            yield f"pack after {name}", result.encode_seconds[i]
            yield f"unpack after {name}", result.decode_seconds[i]


def read_input(cfg: DictConfig, pipeline: Pipeline) -> tuple[list[str], Tensor, list[str]]:
    """Read the images to run: their names, uint8 tensor (B, C, H, W), and labels where they are known.

    Raises:
        FileNotFoundError: ``input`` is neither ``digits``, nor a file, nor a folder with images.
    """
    if cfg.input == "digits":
        data = Digits()
        data.configure_input(pipeline.bundle.input)
        data.setup("test")
        images, labels = data.sample_images("test", cfg.limit or 10**6)
        return [f"digit {i}" for i in range(len(images))], images, [data.class_names[i] for i in labels.tolist()]
    path = Path(cfg.input)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in EXTENSIONS)[: cfg.limit]
        if not files:
            raise FileNotFoundError(f"no image in {path}; files that count end in {', '.join(sorted(EXTENSIONS))}")
        names = [str(f.relative_to(path)) for f in files]
    elif path.is_file():
        files, names = [path], [path.name]
    else:
        raise FileNotFoundError(f"input={cfg.input} is neither an image, nor a folder of images, nor `digits`")
    return names, torch.stack([pipeline.preprocess(file) for file in files]), []


@hydra.main(version_base="1.3", config_path=CONF, config_name="infer")
@friendly
def main(cfg: DictConfig) -> None:
    """Run a bundle."""
    infer(cfg)
    console.print("Another width of the codes: add bits=4 (2 to 16).", highlight=False)


if __name__ == "__main__":
    start(main)
