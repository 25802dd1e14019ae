"""Run a bundle on images: device part → bytes → server part."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("infer")

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from cleave.deployment import Bundle, Codec, PayloadError, Pipeline, Result, load_bundle, read_policy
from cleave.reports.answers import Answer, Tally, print_answers, print_larger_than_files
from cleave.reports.answers_file import check_file
from cleave.reports.terminal import say, table
from cleave.scripts.assembly.given.texts import check_texts
from cleave.scripts.assembly.hints import command
from cleave.scripts.assembly.inferring.asking import Asked, check_remote, check_unasked, device_of, say_how_it_went
from cleave.scripts.assembly.inferring.keeping import Keeper, kept, shown
from cleave.scripts.assembly.inferring.reading import Reading, batches, check_input, image_files, still


def infer(cfg: DictConfig) -> list[str]:
    """Run what the config describes, print it, write the answers where asked to, and return the predicted classes."""
    predicted: list[str] = []
    run_bundle(cfg, lambda answer: predicted.append(answer.prediction))
    return predicted


def run_bundle(cfg: DictConfig, seen: Callable[[Answer], None] | None = None) -> None:
    """Do the same, however many images there are: of their answers no more is held than is printed.

    Args:
        cfg: The config.
        seen: Called with each answer.
    """
    check_settings(cfg)
    if cfg.server is None:
        infer_here(cfg, seen)
    else:
        infer_remotely(cfg, seen)


def infer_here(cfg: DictConfig, seen: Callable[[Answer], None] | None) -> None:
    """Run all sides of a bundle in this process."""
    check_unasked(cfg)
    output = check_file(cfg.output)
    pipeline = pipeline_of(cfg)
    seconds: collections.Counter[str] = collections.Counter()
    with kept(output) as file:
        keeper = Keeper(pipeline.bundle, file, seen)
        # What reads is closed at once, as others may wait for the camera.
        with shown(keeper.tally, cfg.bundle), contextlib.closing(batches(cfg, pipeline)) as source:
            for batch in source:
                try:
                    # TorchScript profiles its first two runs and compiles; that is not what a device would measure.
                    for _ in range(0 if keeper.tally.count else 3):
                        pipeline.run(batch.images)
                    result = pipeline.run(batch.images)
                except PayloadError as error:
                    keeper.add(batch, error.outcome, error.errors)
                    raise
                seconds.update(dict(timings(pipeline, result)))
                keeper.add(batch, result)
    summary(cfg, pipeline, keeper.tally, seconds)
    if output is not None:
        say(f"Written: {output}")


def summary(cfg: DictConfig, pipeline: Pipeline, tally: Tally, seconds: Mapping[str, float]) -> None:
    """Print what the answers come to, what was sent for them, and how long that took."""
    print_answers(f"{tally.count} images through {cfg.bundle}", tally)
    if still(cfg.input) and (found := len(image_files(Path(cfg.input)))) > tally.count:
        say(f"These are the first {tally.count:,} of {found:,} images, by their names; limit=null runs all")
    if pipeline.crossings:
        say(f"Payload: {length_words(tally)}. {width_words(pipeline)}")
        print_larger_than_files(tally)
    if (unmeasured := unmeasured_words(pipeline, cfg.bits)) is not None:
        say(unmeasured)
    exits_summary(pipeline, tally)
    per_image = [(part, f"{1000 * spent / tally.count:.3f}") for part, spent in seconds.items()]
    table(f"Milliseconds per image, batches of {min(cfg.batch_size, tally.count)}", per_image)


def infer_remotely(cfg: DictConfig, seen: Callable[[Answer], None] | None) -> None:
    """Run the side that takes images here and the others on a server."""
    check_remote(cfg)
    output = check_file(cfg.output)
    asked = Asked()
    with device_of(cfg) as device, kept(output) as file:
        check_classes(cfg, device.bundle)
        device.connect()  # another bundle over there is told though all images may leave here
        keeper = Keeper(device.bundle, file, seen)
        title = f"{cfg.bundle} and {cfg.server}"
        with shown(keeper.tally, title), contextlib.closing(batches(cfg, device)) as source:
            reading = Reading(source)
            try:
                for answered in device.stream(reading):
                    batch, lines = reading.waiting.popleft(), answered.lines(device.bundle)
                    asked.add(keeper.add(batch, answered.result, lines=lines))
            except PayloadError as error:
                batch, lines = reading.waiting.popleft(), error.outcome.lines(device.bundle)
                keeper.add(batch, error.outcome.result, error.errors, lines)
                raise
            reading.check()
        print_answers(f"{keeper.tally.count} images through {title}", keeper.tally)
        say_how_it_went(device, asked)
    if output is not None:
        say(f"Written: {output}")


def check_settings(cfg: DictConfig) -> None:
    """Raise :class:`ValueError` or :class:`TypeError` where a setting means nothing, before anything is loaded."""
    check_texts(cfg, {"bundle": "a bundle's folder", "device": "a device of torch, such as cpu"}, null=False)
    check_texts(
        cfg,
        {
            "server": "HOST:PORT",
            "output": "a file",
            "exits.policy_file": "a file",
            "remote.name": "the bundle's name on the server",
            "remote.local": "a bundle's folder",
        },
    )
    check_numbers(cfg)
    check_input(cfg.input)


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


def pipeline_of(cfg: DictConfig) -> Pipeline:
    """Return the pipeline that a config describes.

    Raises:
        ValueError: A setting is out of range, or the bundle does not name classes.
    """
    bundle = load_bundle(cfg.bundle, device=cfg.device)
    check_classes(cfg, bundle)
    file = cfg.exits.policy_file
    return Pipeline(bundle, bits=cfg.bits, policy=None if file is None else read_policy(file))


def exits_summary(pipeline: Pipeline, tally: Tally) -> None:
    """Print where images left, and what that took on average; nothing where there are no exits."""
    known, policy = pipeline.bundle.manifest.exits, pipeline.policy
    if not known:
        return
    shares = [tally.exits[item.name] / tally.count for item in known]
    costs = pipeline.exit_macs
    rows = [(item.name, f"{share:.1%}", f"{cost:,}") for item, share, cost in zip(known, shares, costs, strict=True)]
    decides = "no policy" if policy is None else f"the policy {policy.kind}"
    table(f"Where images left, by {decides}", rows, ("exit", "share", "MACs until there"))
    mean = sum(share * cost for share, cost in zip(shares, costs, strict=True))
    say(f"Per image: {mean:,.0f} MACs ({mean / costs[-1]:.1%} of all), {tally.mean_bytes:,.1f} bytes")


def length_words(tally: Tally) -> str:
    """Say how many bytes were sent per image."""
    if tally.least == tally.most:
        return f"{tally.most:,} bytes an image"
    return f"{tally.mean_bytes:,.1f} bytes an image on average, {tally.least:,} to {tally.most:,}"


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


def main(cfg: DictConfig) -> None:
    """Run a bundle."""
    run_bundle(cfg)
