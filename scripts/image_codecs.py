"""Send the pictures instead of features: an unsplit network's accuracy on what image codecs leave of its input."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("image_codecs")

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from cleave.architectures.naming import did_you_mean
from cleave.datamodules import ImageDataModule
from cleave.deployment import ENVELOPE_BYTES, zstd_bytes
from cleave.deployment.codecs.image_codecs import ImageCodec, image_codec
from cleave.reports.rates.results import RESULTS, Point, write_results
from cleave.reports.terminal import console, table
from cleave.scripts.assembly.hints import next_command
from cleave.scripts.assembly.restoring import restore, restore_data

LOSSY, LOSSLESS = ("jpeg", "webp"), {"webp_lossless": "webp", "png": "png"}


class Tally:
    """Sums over the pictures sent in one way: by a codec, or as they are.

    Args:
        method: Name of the way.
        label: What tells it from others of the same name.
        codec: The codec; ``None`` sends the uint8 pixels.
        envelope: Bytes in front of each payload.
    """

    def __init__(self, method: str, label: str, codec: ImageCodec | None, envelope: int) -> None:
        self.method, self.label, self.codec, self.envelope = method, label, codec, envelope
        self.images = self.correct = self.payload_bytes = self.payload_zstd_bytes = self.file_bytes = 0

    def send(self, images: Tensor) -> Tensor:
        """Count the bytes of uint8 pictures (B, C, H, W) and return what arrives of them."""
        payloads = [image.numpy().tobytes() if self.codec is None else self.codec.encode(image) for image in images]
        self.images += len(images)
        self.payload_bytes += sum(map(len, payloads)) + self.envelope * len(images)
        self.payload_zstd_bytes += sum(map(zstd_bytes, payloads)) + self.envelope * len(images)
        if self.codec is None:
            return images
        self.file_bytes += sum(len(self.codec.file(payload)) for payload in payloads)
        return torch.stack([self.codec.decode(payload) for payload in payloads])

    def point(self, **more: Any) -> Point:
        """Return the means."""
        return Point(
            method=self.method,
            label=self.label,
            accuracy=self.correct / self.images,
            payload_bytes=self.payload_bytes / self.images,
            payload_zstd_bytes=self.payload_zstd_bytes / self.images,
            encoder_macs=0,
            encoder_params=0,
            kind="baseline",
            **more,
        )

    def row(self) -> tuple[str, ...]:
        """Return the means for a person, with the mean length of whole image files beside the payload's."""
        whole = f"{self.file_bytes / self.images:,.1f}" if self.codec else ""
        payload = f"{self.payload_bytes / self.images:,.1f}"
        return f"{self.method}, {self.label}", f"{self.correct / self.images:.4f}", payload, whole


def image_codecs(cfg: DictConfig) -> list[Point]:
    """Measure what the config asks for, print it, and write ``results.json`` to the output folder."""
    if cfg.split not in ("val", "test"):
        raise ValueError(f"split must be val or test, got {cfg.split!r}")
    if str(cfg.device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={cfg.device}: torch finds no CUDA device here; use device=cpu")
    restored = restore(cfg.ckpt_path, trusted=cfg.trust_checkpoint)
    if restored.network.bottlenecks:
        raise ValueError(
            f"{cfg.ckpt_path} holds a split network, which sends features; image codecs are the baseline of the whole "
            "one: give the checkpoint of its base"
        )
    data = restore_data(restored, cfg.data)
    tallies = ways(cfg.codecs, cfg.qualities, data.input.shape, ENVELOPE_BYTES if checked(cfg.envelope) else 0)
    measure(restored.network, data, cfg.split, tallies, torch.device(cfg.device))
    header = ("input", "accuracy", "payload bytes", "as a file")
    table(f"{cfg.ckpt_path} on {tallies[0].images:,} images of {cfg.split}", [t.row() for t in tallies], header)
    console.print(
        "A payload is the file without what both sides know of it; WebP's has a CRC-16 instead."
        + (f" Each but the raw input has an envelope of {ENVELOPE_BYTES} bytes." if cfg.envelope else ""),
        highlight=False,
    )
    backbone = restored.config.backbone.get("name")
    points = [tally.point(backbone=backbone, checkpoint=str(cfg.ckpt_path)) for tally in tallies]
    file = Path(cfg.paths.output_dir) / RESULTS
    write_results(file, points, kind="baseline")
    next_command("compare", {"inputs": [file, "RUNS"]})
    return points


def checked(envelope: Any) -> bool:
    """Return whether payloads have an envelope; ValueError unless that is true or false."""
    if not isinstance(envelope, bool):
        raise ValueError(f"envelope must be true or false, got {envelope!r}")
    return envelope


def ways(
    codecs: str | Sequence[str], qualities: int | Sequence[int], shape: tuple[int, int, int], envelope: int
) -> list[Tally]:
    """List the ways to send a picture: raw, each lossy codec at each quality, each lossless one.

    Raises:
        ValueError: A codec is unknown, or a quality lies outside 1 to 100.
    """
    codecs = [codecs] if isinstance(codecs, str) else codecs
    qualities = [qualities] if isinstance(qualities, int) else qualities
    found = [Tally("uint8 input", "raw", None, 0)]
    for name in dict.fromkeys(codecs):
        if name in LOSSLESS:
            found.append(Tally(f"{LOSSLESS[name]} input", "lossless", image_codec(LOSSLESS[name], shape), envelope))
        elif name in LOSSY:
            for quality in dict.fromkeys(qualities):
                found.append(Tally(f"{name} input", f"q{quality}", image_codec(name, shape, quality), envelope))
        else:
            known = (*LOSSY, *LOSSLESS)
            raise ValueError(f"codecs must be some of {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}")
    return found


@torch.no_grad()
def measure(
    network: nn.Module, data: ImageDataModule, split: str, tallies: Sequence[Tally], device: torch.device
) -> None:
    """Send every picture of a split in every way, and count what the network still recognises."""
    network = network.to(device).eval()
    data.prepare_data()
    for batch in data.eval_dataloader(split):
        for tally in tallies:
            arrived = data.input.normalize(tally.send(batch["images"]).to(device))
            tally.correct += int((network(arrived).argmax(1).cpu() == batch["labels"]).sum())


def main(cfg: DictConfig) -> None:
    """Measure image codecs."""
    image_codecs(cfg)
