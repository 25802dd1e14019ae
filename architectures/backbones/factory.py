"""Backbones by name from timm, torchvision, the CIFAR zoo or any importable class, with the input they expect."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from cleave.architectures.backbones.inputs import constructed_size, describe_input, override_input, timm_input
from cleave.architectures.backbones.sizes import check_runs, needs_size
from cleave.architectures.backbones.surgery import find_classifier, replace_classifier, use_grey_input
from cleave.architectures.backbones.weights import WeightsError, load_weights
from cleave.architectures.backbones.zoo import CIFAR_NETWORKS
from cleave.architectures.naming import did_you_mean, whole_number
from cleave.deployment.runtime.preprocess import ImageInput

SOURCES = ("timm", "torchvision", "cifar", "custom")
TIMM_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")  # names that timm itself looks up, on the hub or in a folder
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")  # of torchvision's GoogLeNet and Inception v3
# torchvision's DenseNet files say "norm.1" where its modules say "norm1".
DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A classification network and what it expects.

    Attributes:
        network: Maps normalised images (B, C, H, W) to logits (B, num_classes); in train mode.
        input: The images it was made for.
        pretrained: Where its weights come from, in words; ``None`` for random weights.
        reinitialised: The classifier's parameters that are random although the rest is pretrained, because the
            pretrained weights are for other classes.
        classifier: Names of the module or modules that give the logits.
    """

    network: nn.Module
    input: ImageInput
    pretrained: str | None = None
    reinitialised: tuple[str, ...] = ()
    classifier: tuple[str, ...] = ()


def create_backbone(
    source: str,
    name: str,
    num_classes: int,
    *,
    pretrained: bool | str = False,
    weights: str | Path | None = None,
    in_channels: int = 3,
    image_input: Mapping[str, Any] | None = None,
    image_size: Sequence[int] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    network: Callable[..., nn.Module] | None = None,
) -> Backbone:
    """Build a backbone for a number of classes, with random, downloaded or local weights.

    Args:
        source: ``timm``, ``torchvision``, ``cifar`` (``CIFAR_NETWORKS``) or ``custom``.
        name: Model name in that source; for ``custom`` the dotted path of a class or function.
        num_classes: Size of the output, at least 2; a pretrained classifier of another size is replaced at random.
        pretrained: ``True`` downloads the source's default weights; torchvision also takes the name of a weight set
            (timm names its sets in the model name, such as ``resnet18.a1_in1k``).
        weights: A local checkpoint instead; see :func:`cleave.architectures.backbones.weights.load_weights`.
        in_channels: 3 for RGB or 1 for grey images. Pretrained RGB kernels are summed for grey.
        image_input: Fields of ``ImageInput`` to override. A new ``height`` or ``width``
            scales ``resize`` along. For ``custom``, ``height`` and ``width`` are required.
        image_size: (height, width) of the images where it is known that they have another size than the network's own;
            ``None`` takes that of ``image_input``. A network of timm or torchvision that runs at no other size than it
            was built for is built for this one.
        kwargs: Further arguments of the constructor, passed on verbatim.
        network: For ``custom``: the constructor itself, such as a ``functools.partial``; ``name`` only describes it
            then. ``num_classes`` and ``in_channels`` are passed where the constructor takes them.

    Returns:
        The network in train mode, with its input.

    Raises:
        ValueError: An argument is unknown or out of range, or the constructor refuses ``kwargs``.
        WeightsError: The weights cannot be downloaded or read, or belong to another architecture.

    Example:
        >>> backbone = create_backbone("cifar", "resnet20", num_classes=10)
        >>> backbone.input.shape
        (3, 32, 32)
    """
    _check_arguments(source, name, num_classes, pretrained, weights, in_channels, network)
    options = dict(kwargs or {})
    if image_size is None and image_input and {"height", "width"} <= image_input.keys():
        image_size = (image_input["height"], image_input["width"])
    if source == "timm":
        backbone = _timm(name, num_classes, bool(pretrained), in_channels, options)
        if image_size is not None and needs_size(backbone, "img_size", image_size, options):
            options["img_size"] = tuple(image_size)
            backbone = _timm(name, num_classes, bool(pretrained), in_channels, options)
            check_runs(backbone, name, image_size)
    elif source == "torchvision":
        backbone = _torchvision(name, num_classes, pretrained, in_channels, dict(options))
        if image_size is not None and needs_size(backbone, "image_size", image_size, options):
            options["image_size"] = image_size[0]
            backbone = _torchvision(name, num_classes, pretrained, in_channels, options)
            check_runs(backbone, name, image_size)
    elif source == "cifar":
        backbone = _cifar(name, num_classes, in_channels, options)
    else:
        backbone = _custom(name, network, num_classes, in_channels, options, image_input)
    overrides = {**constructed_size(options), **(image_input or {})}
    backbone = dataclasses.replace(backbone, input=override_input(backbone.input, overrides, in_channels))
    if source == "custom":
        _check_output(backbone, name, num_classes)
        last = find_classifier(backbone.network, num_classes)  # only now are lazy layers' shapes known
        backbone = dataclasses.replace(backbone, classifier=(last,) if last else ())
    return backbone if weights is None else _load(backbone, Path(weights).expanduser(), source, name)


def _load(backbone: Backbone, path: Path, source: str, name: str) -> Backbone:
    hub_files = source == "torchvision"
    report = load_weights(
        backbone.network,
        path,
        classifier=backbone.classifier,
        architecture=f"{source} {name}",
        ignore=AUXILIARY_HEADS if hub_files else (),
        rename=_densenet_key if hub_files else None,
    )
    return dataclasses.replace(backbone, pretrained=str(path), reinitialised=report.classifier)


def _check_arguments(
    source: str,
    name: str,
    num_classes: int,
    pretrained: bool | str,
    weights: str | Path | None,
    in_channels: int,
    network: object,
) -> None:
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}.{did_you_mean(source, SOURCES)}")
    whole_number("num_classes", num_classes, 2)
    if in_channels not in (1, 3):
        raise ValueError(f"in_channels must be 3 (RGB) or 1 (grey), got {in_channels!r}")
    if pretrained and weights is not None:
        raise ValueError(f"give either pretrained={pretrained!r} or weights={str(weights)!r}, not both")
    if network is not None and (source != "custom" or isinstance(network, nn.Module) or not callable(network)):
        raise ValueError(
            f"network is a constructor for source 'custom' (in a config: _target_ with _partial_: true), "
            f"got {type(network).__name__} for source {source!r}"
        )
    if isinstance(pretrained, str) and source == "timm":
        raise ValueError(
            f"timm names weights in the model name, such as 'resnet18.a1_in1k': use name='{name}.{pretrained}' "
            f"with pretrained=true instead of pretrained={pretrained!r}"
        )
    if pretrained and source in ("cifar", "custom"):
        raise ValueError(f"source {source!r} has no weights to download for {name!r}; give weights=FILE instead")


def _timm(name: str, num_classes: int, pretrained: bool, in_channels: int, options: dict[str, Any]) -> Backbone:
    elsewhere = name.startswith(TIMM_SOURCES)
    if not elsewhere:
        _check_timm_name(name, pretrained)
    with _building("timm", name, options, pretrained or elsewhere):
        network = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, **options
        )
    config = network.pretrained_cfg
    named = config.get("classifier") or find_classifier(network, num_classes)
    classifier = (named,) if isinstance(named, str) else tuple(named or ())
    reset = _parameters(network, classifier) if pretrained and config["num_classes"] != num_classes else ()
    kept = name if elsewhere else f"{name.partition('.')[0]}.{config['tag']}"
    origin = f"timm {kept}" if pretrained else None
    return Backbone(network, timm_input(name, network, in_channels), origin, reset, classifier)


def _check_timm_name(name: str, pretrained: bool) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {architecture!r}.{did_you_mean(architecture, timm.list_models())}")
    sets = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in sets:
        raise ValueError(f"timm has no weights {name!r}; for {architecture} it has {', '.join(sets) or 'none'}")
    if pretrained and not timm.models.is_model_pretrained(name):
        raise ValueError(f"timm has no weights to download for {name!r}; give weights=FILE or pretrained=false")


def _torchvision(
    name: str, num_classes: int, pretrained: bool | str, in_channels: int, options: dict[str, Any]
) -> Backbone:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ValueError(f"torchvision has no classification model {name!r}.{did_you_mean(name, names)}")
    chosen = _weight_set(name, pretrained, options)
    translate = "transform_input" not in options
    if name in ("googlenet", "inception_v3"):
        # Without weights their constructors warn unless told how to initialise; with weights they refuse to be told.
        options = {"aux_logits": False, **({} if pretrained else {"init_weights": True}), **options}
    with _building("torchvision", name, options, bool(pretrained)):
        if pretrained:
            network = torchvision.models.get_model(name, weights=chosen, **options)
        else:
            network = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    classes = len(chosen.meta["categories"]) if pretrained else num_classes
    classifier = find_classifier(network, classes)
    if classifier is None:
        raise ValueError(f"torchvision {name} has no layer with {classes} outputs to be its classifier")
    if classes != num_classes:
        replace_classifier(network, classifier, num_classes)
    if in_channels == 1:
        use_grey_input(network)
    preset = chosen.transforms()
    mean, std = preset.mean, preset.std
    if translate and hasattr(network, "transform_input"):
        # These two may re-normalise ImageNet's statistics to 0.5 ± 0.5 in their forward; here the input says so.
        network.transform_input, mean, std = False, (0.5,) * 3, (0.5,) * 3
    (size,), (resize,) = preset.crop_size, preset.resize_size
    spec = describe_input(size, size, in_channels, mean, std, resize, preset.interpolation.value)
    reset = _parameters(network, (classifier,)) if classes != num_classes else ()
    return Backbone(network, spec, f"torchvision {chosen}" if pretrained else None, reset, (classifier,))


def _weight_set(name: str, pretrained: bool | str, options: dict[str, Any]) -> Any:
    """Choose torchvision's weight set, and fix the image size of networks that depend on it."""
    sets = torchvision.models.get_model_weights(name)
    if isinstance(pretrained, str) and pretrained not in sets.__members__:
        raise ValueError(f"torchvision has no weights {pretrained!r} for {name}; known: {', '.join(sets.__members__)}")
    chosen = sets[pretrained] if isinstance(pretrained, str) else sets.DEFAULT
    if name.startswith("vit_") and "image_size" not in options:
        # Said here, the same network is built again without the weights, as for a checkpoint of one's own.
        (size,), (usual,) = chosen.transforms().crop_size, sets.DEFAULT.transforms().crop_size
        if size != usual:
            raise ValueError(
                f"weights {pretrained!r} of {name} are for {size} pixels: give kwargs.image_size={size} too"
            )
        options["image_size"] = size
    return chosen


def _cifar(name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> Backbone:
    if name not in CIFAR_NETWORKS:
        raise ValueError(
            f"cifar has no network {name!r}.{did_you_mean(name, CIFAR_NETWORKS)} Known: {', '.join(CIFAR_NETWORKS)}"
        )
    with _building("cifar", name, options):
        network = CIFAR_NETWORKS[name](num_classes=num_classes, in_channels=in_channels, **options)
    classifier = find_classifier(network, num_classes)
    return Backbone(network, describe_input(32, 32, in_channels), classifier=(classifier,) if classifier else ())


def _custom(
    name: str,
    constructor: Callable[..., nn.Module] | None,
    num_classes: int,
    in_channels: int,
    options: dict[str, Any],
    image_input: Mapping[str, Any] | None,
) -> Backbone:
    missing = [key for key in ("height", "width") if key not in (image_input or {})]
    if missing:
        raise ValueError(f"custom backbone {name!r} needs image_input.{' and image_input.'.join(missing)} in pixels")
    build = constructor or _import(name)
    parameters = inspect.signature(build).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "num_classes" in parameters or open_ended:
        options["num_classes"] = num_classes
    # An open-ended constructor that only knows RGB would fail on an argument it need not have.
    if "in_channels" in parameters or (open_ended and in_channels != 3):
        options["in_channels"] = in_channels
    with _building("custom", name, options):
        network = build(**options)
    if not isinstance(network, nn.Module):
        raise ValueError(f"custom backbone {name!r} must give an nn.Module, got {type(network).__name__}")
    return Backbone(network.train(), describe_input(1, 1, in_channels))


def _import(name: str) -> Callable[..., nn.Module]:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"custom backbone {name!r} cannot be imported: {error}; give package.module.Class") from error
    if not callable(found):
        raise ValueError(f"custom backbone {name!r} is not a class or function but {type(found).__name__}")
    return found


def _check_output(backbone: Backbone, name: str, num_classes: int) -> None:
    """Run a custom network once, so that a wrong class count or input is found before any training time is spent."""
    network, shape = backbone.network, backbone.input.shape
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            output = network(torch.zeros(2, *shape))
    except Exception as error:  # a stranger's forward may raise anything
        raise ValueError(f"custom backbone {name!r} fails on images {(2, *shape)}: {error}") from error
    for module, training in modes:
        module.training = training
    if not isinstance(output, torch.Tensor) or output.shape != (2, num_classes):
        got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(
            f"custom backbone {name!r} must map images {(2, *shape)} to logits {(2, num_classes)}, got {got}; "
            f"let its constructor take num_classes"
        )


@contextmanager
def _building(source: str, name: str, options: Mapping[str, Any], download: bool = False) -> Iterator[None]:
    """Turn the failures of a constructor or a download into one clear error."""
    try:
        yield
    except TypeError as error:
        raise ValueError(f"{source} {name!r} cannot be built with {dict(options)}: {error}") from error
    except Exception as error:  # hubs raise errors of four libraries
        if not download:
            raise ValueError(f"{source} {name!r} cannot be built with {dict(options)}: {error}") from error
        raise WeightsError(
            f"the pretrained weights of {source} {name!r} could not be downloaded or loaded "
            f"({type(error).__name__}: {error}). Without network, give a local file by backbone.weights=FILE, or train "
            f"from random weights with backbone.pretrained=false"
        ) from error


def _parameters(network: nn.Module, modules: Sequence[str]) -> tuple[str, ...]:
    """Names of the parameters of some modules."""
    return tuple(name for name, _ in network.named_parameters() if name.rpartition(".")[0] in modules)


def _densenet_key(key: str) -> str:
    return DENSENET_KEY.sub(r"\1\2.", key)
