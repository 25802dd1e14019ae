"""Run a bundle on images: device part → bytes → server part."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("infer")

import collections
import itertools
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from cleave.datamodules import Digits
from cleave.datamodules.sets.image_folder import EXTENSIONS
from cleave.deployment import (
    Bundle,
    Codec,
    ImageInput,
    Pipeline,
    Result,
    exit_shares,
    load_bundle,
    read_policy,
)
from cleave.deployment.runtime.frames import VIDEO_ENDINGS, frames
from cleave.reports.answers import Answer, check_file, print_answers, print_larger_than_files, write_answers
from cleave.reports.terminal import say, table
from cleave.scripts.assembly.asking import check_unasked, device_of, say_how_it_went, write_lines
from cleave.scripts.assembly.hints import command

if TYPE_CHECKING:
    from cleave.deployment import Device


def infer(cfg: DictConfig) -> list[str]:
    """Run what the config describes, print it, write the answers where asked to, and return the predicted classes."""
    if cfg.server is not None:
        return infer_remotely(cfg)
    check_unasked(cfg)
    pipeline, output = checked(cfg)
    answers: list[Answer] = []
    left: list[int] = []
    seconds: dict[str, float] = {}
    for batch in batches(cfg, pipeline):
        # TorchScript profiles its first two runs and compiles; that is not what a device would measure.
        for _ in range(0 if answers else 3):
            pipeline.run(batch.images)
        result = pipeline.run(batch.images)
        for part, spent in timings(pipeline, result):
            seconds[part] = seconds.get(part, 0.0) + spent
        left += [] if result.exits is None else result.exits.tolist()
        answers += answered(pipeline.bundle, batch, result)
    if output is not None:
        write_answers(output, answers)
    print_answers(f"{len(answers)} images through {cfg.bundle}", answers)
    still = cfg.input != "digits" and moving(cfg.input) is None
    if still and (found := len(image_files(Path(cfg.input)))) > len(answers):
        say(f"These are the first {len(answers):,} of {found:,} images, by their names; limit=null runs all")
    lengths = [answer.payload_bytes for answer in answers]
    if pipeline.crossings:
        say(f"Payload: {length_words(lengths)}. {width_words(pipeline)}")
        print_larger_than_files(answers)
    if (unmeasured := unmeasured_words(pipeline, cfg.bits)) is not None:
        say(unmeasured)
    exits_summary(pipeline, left, lengths)
    per_image = [(part, f"{1000 * spent / len(answers):.3f}") for part, spent in seconds.items()]
    table(f"Milliseconds per image, batches of {min(cfg.batch_size, len(answers))}", per_image)
    if output is not None:
        say(f"Written: {output}")
    return [answer.prediction for answer in answers]


def infer_remotely(cfg: DictConfig) -> list[str]:
    """Run the side that takes images here and the others on a server, and return the predicted classes."""
    check_numbers(cfg)
    output = check_file(cfg.output)
    answers: list[Answer] = []
    lines: list[dict[str, Any]] = []
    waiting: collections.deque[Batch] = collections.deque()

    def read(device: Device) -> Iterator[Tensor]:
        for batch in batches(cfg, device):
            waiting.append(batch)
            yield batch.images

    with device_of(cfg) as device:
        check_classes(cfg, device.bundle)
        for answered_batch in device.stream(read(device)):
            batch = waiting.popleft()
            answers += answered(device.bundle, batch, answered_batch.result)
            found = answered_batch.lines(device.bundle)
            lines += [{"image": name, **line} for name, line in zip(batch.names, found, strict=True)]
        if output is not None:
            write_lines(output, lines)
        print_answers(f"{len(answers)} images through {cfg.bundle} and {cfg.server}", answers)
        say_how_it_went(device, lines)
    if output is not None:
        say(f"Written: {output}")
    return [answer.prediction for answer in answers]


def check_numbers(cfg: DictConfig) -> None:
    """Raise :class:`ValueError` where a number is out of range, or torch finds no such device."""
    if not isinstance(cfg.batch_size, int) or cfg.batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {cfg.batch_size}")
    if cfg.limit is not None and (not isinstance(cfg.limit, int) or cfg.limit < 1):
        raise ValueError(f"limit must be a whole number of at least 1, or null for all images, got {cfg.limit}")
    if str(cfg.device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={cfg.device}: torch finds no CUDA device here; use device=cpu")


def check_classes(cfg: DictConfig, bundle: Bundle) -> None:
    """Raise :class:`ValueError` where a bundle does not name classes."""
    if [each.kind for each in bundle.manifest.outputs] != ["logits"]:
        found = ", ".join(f"{each.name} ({each.kind})" for each in bundle.manifest.outputs)
        raise ValueError(f"bundle={cfg.bundle} answers with {found}; infer.py names classes, so run it by Pipeline")


def checked(cfg: DictConfig) -> tuple[Pipeline, Path | None]:
    """Return the pipeline that a config describes, and where its answers are to be written.

    Raises:
        ValueError: A setting is out of range, or the bundle does not name classes.
    """
    check_numbers(cfg)
    output = check_file(cfg.output)
    bundle = load_bundle(cfg.bundle, device=cfg.device)
    check_classes(cfg, bundle)
    file = cfg.exits.policy_file
    return Pipeline(bundle, bits=cfg.bits, policy=None if file is None else read_policy(file)), output


class Batch(NamedTuple):
    """Images as a bundle takes them, uint8 (B, C, H, W), with what is known of each."""

    images: Tensor
    names: list[str]
    labels: list[str | None]
    file_bytes: list[int | None]


def answered(bundle: Bundle, batch: Batch, result: Result) -> Iterator[Answer]:
    """Put what came out of a batch beside what is known of its images."""
    (logits,) = result.outputs.values()
    confidences, indices = (values.tolist() for values in logits.softmax(1).max(1))
    exits = [] if result.exits is None else result.exits.tolist()
    for i, name in enumerate(batch.names):
        yield Answer(
            image=name,
            prediction=bundle.class_names[indices[i]],
            label=batch.labels[i],
            confidence=confidences[i],
            payload_bytes=result.payload_bytes[i],
            file_bytes=batch.file_bytes[i],
            exit=None if not exits or exits[i] < 0 else bundle.manifest.exits[exits[i]].name,
        )


def exits_summary(pipeline: Pipeline, left: Sequence[int], lengths: Sequence[int]) -> None:
    """Print where images left, and what that took on average; nothing where there are no exits."""
    known, policy = pipeline.bundle.manifest.exits, pipeline.policy
    if not known:
        return
    shares = exit_shares(torch.tensor(left), len(known))
    costs = pipeline.exit_macs
    rows = [(item.name, f"{share:.1%}", f"{cost:,}") for item, share, cost in zip(known, shares, costs, strict=True)]
    decides = "no policy" if policy is None else f"the policy {policy.kind}"
    table(f"Where images left, by {decides}", rows, ("exit", "share", "MACs until there"))
    mean = sum(share * cost for share, cost in zip(shares, costs, strict=True))
    say(f"Per image: {mean:,.0f} MACs ({mean / costs[-1]:.1%} of all), {sum(lengths) / len(lengths):,.1f} bytes")


def length_words(lengths: Sequence[int]) -> str:
    """Say how many bytes were sent per image."""
    if min(lengths) == max(lengths):
        return f"{lengths[0]:,} bytes an image"
    return f"{sum(lengths) / len(lengths):,.1f} bytes an image on average, {min(lengths):,} to {max(lengths):,}"


def width_words(pipeline: Pipeline) -> str:
    """Say at which widths the codes were sent, and how to ask for another that was measured."""
    widths = widths_of(pipeline.codecs)
    if not widths:
        return "There is no other width."
    others = sorted(measured_widths(pipeline.bundle) - set(widths))
    more = f"; also measured: {', '.join(f'bits={bits}' for bits in others)}" if others else ""
    return f"Codes of {' and '.join(map(str, widths))} bits{more}"


def widths_of(codecs: Mapping[str, Codec]) -> list[int]:
    """Return the widths of all integer codes that are sent."""
    return [codec.bits for codec in codecs.values() if codec.levels]


def points_of(bundle: Bundle) -> list[Mapping[str, Any]]:
    """Return what a bundle's manifest says was measured, a point for each width."""
    points = bundle.manifest.metrics.get("points")
    return [point for point in points if isinstance(point, dict)] if isinstance(points, list) else []


def measured_widths(bundle: Bundle) -> set[int]:
    """Return the widths at which a bundle was measured as a whole: its own, and those that it was trained for."""
    own = set(widths_of(bundle.manifest.route.codecs))
    points = points_of(bundle)
    several = {bits for point in points if isinstance(bits := point.get("bits"), int)} if len(points) > 1 else set()
    return several | (own if len(own) == 1 else set())


def unmeasured_words(pipeline: Pipeline, bits: int | None) -> str | None:
    """Warn of a width at which nobody has measured the network, and name the way to one that is measured."""
    own = sorted(set(widths_of(pipeline.bundle.manifest.route.codecs)))
    if bits is None or bits in measured_widths(pipeline.bundle):
        return None
    # A bundle knows its checkpoint by name alone.
    names = (point.get("checkpoint") for point in points_of(pipeline.bundle))
    known = next((f", of {name}" for name in names if name), "")
    way = command("export", {"ckpt_path": "FILE", "codec.bits": bits})
    return (
        f"Warning: bits={bits} was never measured. This bundle was made for {' and '.join(map(str, own))} bits; at "
        "others its BatchNorm statistics do not fit, and answers may be far worse. "
        f"A bundle for {bits} bits{known}: {way}"
    )


def timings(pipeline: Pipeline, result: Result) -> Iterator[tuple[str, float]]:
    """Seconds of each partition, and of what is packed and unpacked behind it, in the order of the route."""
    for name, spent in result.part_seconds.items():
        yield f"{name} partition", spent
        sent = [key for key, crossing in pipeline.crossings.items() if crossing.producer == name]
        if sent:
            yield f"pack after {name}", sum(result.encode_seconds[key] for key in sent)
            yield f"unpack after {name}", sum(result.decode_seconds[key] for key in sent)


def batches(cfg: DictConfig, pipeline: Pipeline | Device) -> Iterator[Batch]:
    """Read the images batch by batch; the class of a file is the folder nearest to it that has a class's name.

    Raises:
        FileNotFoundError: ``input`` is neither ``digits``, nor a file, nor a folder with images.
        ImageError: A picture, or a video, cannot be read.
    """
    size = cfg.batch_size
    if (source := moving(cfg.input)) is not None:
        yield from frame_batches(source, image_input(pipeline), size, cfg.limit)
        return
    if cfg.input == "digits":
        data = Digits()
        data.configure_input(image_input(pipeline))
        batch = data.sample_batch("test", cfg.limit or 10**6)
        images, labels = batch["images"], batch["labels"]
        for start in range(0, len(images), size):
            some = range(start, min(start + size, len(images)))
            known = [data.class_names[label] for label in labels[some.start : some.stop].tolist()]
            yield Batch(images[some.start : some.stop], [f"digit {i}" for i in some], known, [None] * len(some))
        return
    folder = Path(cfg.input)
    files = image_files(folder)[: cfg.limit]
    for start in range(0, len(files), size):
        some_files = files[start : start + size]
        yield Batch(
            torch.stack([pipeline.preprocess(file) for file in some_files]),
            [str(file.relative_to(folder)) if folder.is_dir() else file.name for file in some_files],
            [class_of(file, folder, pipeline.bundle.class_names) for file in some_files],
            [file.stat().st_size for file in some_files],
        )


def moving(given: Any) -> str | int | None:
    """Return a video file or the index of a camera where ``input`` is one."""
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    return str(given) if Path(str(given)).suffix.lower() in VIDEO_ENDINGS else None


def frame_batches(source: str | int, spec: ImageInput, size: int, limit: int | None) -> Iterator[Batch]:
    """Yield the frames of a video or a camera, batch by batch."""
    numbered = enumerate(frames(source, limit))
    while some := list(itertools.islice(numbered, size)):
        images = torch.stack([spec(picture) for _, picture in some])
        yield Batch(images, [f"frame {number}" for number, _ in some], [None] * len(some), [None] * len(some))


def class_of(file: Path, root: Path, class_names: Sequence[str]) -> str | None:
    """Return the class that the folders of an image name, the nearest first and the root's own last; ``None``: none."""
    depth = len(file.relative_to(root).parts) if root.is_dir() else 1
    folders = [folder.name for folder in file.absolute().parents[:depth]]
    known = {unicodedata.normalize("NFC", name): name for name in class_names}
    found = (known.get(unicodedata.normalize("NFC", name)) for name in folders)
    return next((name for name in found if name is not None), None)


def image_input(pipeline: Pipeline | Device) -> ImageInput:
    """Return how images become the bundle's input; ValueError where it takes none."""
    found = pipeline.bundle.input
    if not isinstance(found, ImageInput):
        raise ValueError(
            f"this bundle takes {found.name}, {found.dtype} {list(found.shape)}, so infer.py cannot read it"
        )
    return found


def image_files(path: Path) -> list[Path]:
    """An image itself, or all images below a folder in the order of their names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"input={path} is neither an image, nor a folder of images, nor `digits`")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS)
    if not files:
        raise FileNotFoundError(f"no image in {path}; files that count end in {', '.join(sorted(EXTENSIONS))}")
    return files


def main(cfg: DictConfig) -> None:
    """Run a bundle."""
    infer(cfg)
