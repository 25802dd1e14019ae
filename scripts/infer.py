"""Run a bundle on images: device part → bytes → server part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor

from cleave.datamodules import Digits
from cleave.datamodules.sets.image_folder import EXTENSIONS
from cleave.deployment import ImageInput, Pipeline, Result, exit_shares, load_bundle, read_policy
from cleave.reports.terminal import console, table
from cleave.scripts.assembly.terminal import CONF, friendly, start


def infer(cfg: DictConfig) -> list[str]:
    """Run what the config describes, print it, and return the predicted class names."""
    if not isinstance(cfg.batch_size, int) or cfg.batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {cfg.batch_size}")
    if str(cfg.device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={cfg.device}: torch finds no CUDA device here; use device=cpu")
    bundle = load_bundle(cfg.bundle, device=cfg.device)
    if [output.kind for output in bundle.manifest.outputs] != ["logits"]:
        found = ", ".join(f"{output.name} ({output.kind})" for output in bundle.manifest.outputs)
        raise ValueError(f"bundle={cfg.bundle} answers with {found}; infer.py names classes, so run it by Pipeline")
    file = cfg.exits.policy_file
    pipeline = Pipeline(bundle, bits=cfg.bits, policy=None if file is None else read_policy(file))
    known = bundle.manifest.exits
    rows: list[tuple[str, ...]] = []
    predicted: list[str] = []
    lengths: list[int] = []
    left: list[int] = []
    seconds: dict[str, float] = {}
    for names, images, labels in batches(cfg, pipeline):
        # TorchScript profiles its first two runs and compiles; that is not what a device would measure.
        for _ in range(0 if rows else 3):
            pipeline.run(images)
        result = pipeline.run(images)
        for part, spent in timings(pipeline, result):
            seconds[part] = seconds.get(part, 0.0) + spent
        lengths += result.payload_bytes
        exits = [] if result.exits is None else result.exits.tolist()
        left += exits
        (logits,) = result.outputs.values()
        confidences, indices = (values.tolist() for values in logits.softmax(1).max(1))
        for i, name in enumerate(names):
            predicted.append(bundle.class_names[indices[i]])
            where = (known[exits[i]].name,) if exits else ()
            row = (name, predicted[-1], labels[i], f"{confidences[i]:.3f}", f"{result.payload_bytes[i]:,}")
            rows.append((*row, *where))
    header = ("image", "prediction", "label", "confidence", "payload bytes", *(("exit",) if known else ()))
    table(f"{len(rows)} images through {cfg.bundle}", rows, header)
    if pipeline.crossings:
        console.print(f"Payload: {length_words(lengths)}. {width_words(pipeline)}", soft_wrap=True, highlight=False)
    exits_summary(pipeline, left, lengths)
    per_image = [(part, f"{1000 * spent / len(rows):.3f}") for part, spent in seconds.items()]
    table(f"Milliseconds per image, batches of {min(cfg.batch_size, len(rows))}", per_image)
    return predicted


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
    console.print(
        f"Per image: {mean:,.0f} MACs ({mean / costs[-1]:.1%} of all), {sum(lengths) / len(lengths):,.1f} bytes",
        highlight=False,
    )


def length_words(lengths: Sequence[int]) -> str:
    """Say how many bytes were sent per image."""
    if min(lengths) == max(lengths):
        return f"{lengths[0]:,} bytes an image"
    return f"{sum(lengths) / len(lengths):,.1f} bytes an image on average, {min(lengths):,} to {max(lengths):,}"


def width_words(pipeline: Pipeline) -> str:
    """Say at which widths the codes were sent, and how to ask for another."""
    widths = [codec.bits for codec in pipeline.codecs.values() if codec.levels]
    if not widths:
        return "There is no other width."
    return f"Codes of {' and '.join(map(str, widths))} bits; another width: add bits={4 if 4 not in widths else 8}"


def timings(pipeline: Pipeline, result: Result) -> Iterator[tuple[str, float]]:
    """Seconds of each partition, and of what is packed and unpacked behind it, in the order of the route."""
    for name, spent in result.part_seconds.items():
        yield f"{name} partition", spent
        sent = [key for key, crossing in pipeline.crossings.items() if crossing.producer == name]
        if sent:
            yield f"pack after {name}", sum(result.encode_seconds[key] for key in sent)
            yield f"unpack after {name}", sum(result.decode_seconds[key] for key in sent)


def batches(cfg: DictConfig, pipeline: Pipeline) -> Iterator[tuple[list[str], Tensor, list[str]]]:
    """Read the images batch by batch: their names, uint8 tensor (B, C, H, W), and labels, empty where unknown.

    Raises:
        FileNotFoundError: ``input`` is neither ``digits``, nor a file, nor a folder with images.
    """
    size = cfg.batch_size
    if cfg.input == "digits":
        data = Digits()
        data.configure_input(image_input(pipeline))
        batch = data.sample_batch("test", cfg.limit or 10**6)
        images, labels = batch["images"], batch["labels"]
        for start in range(0, len(images), size):
            some = range(start, min(start + size, len(images)))
            known = [data.class_names[label] for label in labels[some.start : some.stop].tolist()]
            yield [f"digit {i}" for i in some], images[some.start : some.stop], known
        return
    folder = Path(cfg.input)
    files = image_files(folder)[: cfg.limit]
    for start in range(0, len(files), size):
        some_files = files[start : start + size]
        images = torch.stack([pipeline.preprocess(file) for file in some_files])
        names = [str(file.relative_to(folder)) if folder.is_dir() else file.name for file in some_files]
        yield names, images, [""] * len(some_files)


def image_input(pipeline: Pipeline) -> ImageInput:
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


@hydra.main(version_base="1.3", config_path=CONF, config_name="infer")
@friendly
def main(cfg: DictConfig) -> None:
    """Run a bundle."""
    infer(cfg)


if __name__ == "__main__":
    from cleave.scripts.infer import main  # launchers of other processes import it from there

    start(main)
