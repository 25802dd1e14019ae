"""How many networks can be cut exactly: 103 families, and those that users write, with random weights.

Every family is cut at the points nearest to 25, 50 and 75 % of its MACs among all that ``cut_points`` lists. It passes
if

- the stages' output equals the backbone's in eval mode in every bit (NaN anywhere fails),
- outputs, gradients, buffers and the state of the random generators are equal in training mode under two seeds, with
  dropout and drop-path on where the family has them, and weights perturbed so that layers initialised with zeros hide
  nothing,
- a deep copy and an unpickled copy of the stages give equal outputs,
- the stages traced to TorchScript agree at another batch size,
- ``cut_points`` takes at most 30 seconds on one core, its check included.

Each network of ``user_networks.py`` passes if it is cut and equal in training mode under five seeds, or refused in the
words that its file expects.

The exit code is 0 if at least 102 of the 103 and all of the others pass. One line a network is written as soon as it is
known:

    python benchmarks/cut_coverage.py
    python benchmarks/cut_coverage.py --only resnet swin user --jobs 2
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import copy
import gc
import multiprocessing
import pickle
import random
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from user_networks import NETWORKS

from cleave.architectures import CutError, CutPoint, Stages, count_macs, cut, cut_points, spread

SECONDS = 30.0
SHARES = (0.25, 0.5, 0.75)
# CrossViT passes the tensors of two branches wherever it could be cut.
REFUSABLE = 1


def build(source: str, name: str) -> tuple[nn.Module, Tensor]:
    """Make a family's network with random weights, dropout and drop-path where it has them, and one image."""
    torch.manual_seed(0)
    if source == "tv":
        plain = {"aux_logits": False, "init_weights": True} if name in ("inception_v3", "googlenet") else {}
        network = torchvision.models.get_model(name, weights=None, **plain)
        size = (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    else:
        plain = {"aux_logits": False} if name == "inception_v3" else {}
        for regular in ({"drop_rate": 0.1, "drop_path_rate": 0.1}, {"drop_rate": 0.1}, {}):
            with contextlib.suppress(TypeError, AssertionError):
                network = timm.create_model(name, pretrained=False, **plain, **regular)
                break
        size = network.pretrained_cfg["input_size"]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return network, torch.randn(1, *size)


def nearest(points: list[CutPoint], total: int) -> list[str]:
    """Names of the points nearest to the shares of the work, without repetition."""
    spread(points, 1)  # refuses an empty list in words
    picked = {min(range(len(points)), key=lambda i: abs(points[i].macs - share * total)) for share in SHARES}
    return [points[i].name for i in sorted(picked)]


def train_step(network: nn.Module, owner: nn.Module, images: Tensor, seed: int) -> dict[str, Tensor]:
    """One forward and backward pass in training mode under one seed; results by name."""
    network.train(), owner.train()
    owner.zero_grad()
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)  # noqa: NPY002 what networks draw from
    leaf = images.clone().requires_grad_(images.is_floating_point())
    outputs = [output for output in tree_leaves(network(leaf)) if output.requires_grad]
    sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs).backward()
    gradients = {f"grad {name}": p.grad for name, p in owner.named_parameters() if p.grad is not None}
    gradients |= {} if leaf.grad is None else {"grad input": leaf.grad}
    draws = {"draws": torch.get_rng_state(), "others": torch.tensor([random.random(), np.random.rand()])}  # noqa: NPY002
    buffers = {f"buffer {name}": buffer.clone() for name, buffer in owner.named_buffers()}
    return {f"output {i}": output.detach() for i, output in enumerate(outputs)} | gradients | buffers | draws


def compare(label: str, actual: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Raise unless two results agree; NaN equals nothing."""
    try:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    except AssertionError as error:
        raise AssertionError(f"{label}: {' '.join(str(error).split())[:200]}") from None


def check_eval(stages: Stages, network: nn.Module, images: Tensor) -> None:
    """Stages, their deep copy and their pickled copy give the backbone's output."""
    network.eval()
    stages.eval()
    with torch.no_grad():
        expected = network(images)
        compare("eval", stages(images), expected)
        compare("deepcopy", copy.deepcopy(stages)(images), expected)
        compare("pickle", pickle.loads(pickle.dumps(stages))(images), expected)  # noqa: S301


def check_script(stages: Stages, network: nn.Module, images: Tensor) -> None:
    """Stages traced to TorchScript on one image agree with the backbone on three."""
    other = torch.cat([images, images.flip(-1), images.flip(-2)])
    h, out = images, other
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch marks TorchScript deprecated, and tracing remarks on constants
        for stage in stages.eval():
            script = torch.jit.trace(stage, (h,), check_trace=False)
            h, out = stage(h), script(out)
        compare("TorchScript", out, network.eval()(other), tolerance=1e-5)


def examine(source: str, name: str) -> tuple[str, str]:
    """Check one family; return ``passed``, ``refused`` or ``FAILED``, and a line of detail."""
    if source == "user":
        return examine_users(name)
    torch.set_num_threads(1)
    network, images = build(source, name)
    try:
        start = time.process_time()  # of one core, whatever else the machine does
        points = cut_points(network, images)
        seconds = time.process_time() - start
        detail = f"{len(points):4d} cut points in {seconds:5.1f} s"
        names = nearest(points, count_macs(network, images))
        twin = copy.deepcopy(network)
        start = time.process_time()
        stages = cut(twin, names, images)
        detail += f", cut in {time.process_time() - start:5.1f} s at {', '.join(names)}"
        check_eval(stages, network, images)
        pair = torch.cat([images, images.flip(-1)])
        for seed in (1, 2):
            compare("train", train_step(stages, twin, pair, seed), train_step(network, network, pair, seed))
        network.load_state_dict(twin.state_dict())
        check_script(stages, network, images)
        if seconds > SECONDS:
            raise AssertionError(f"cut_points took more than {SECONDS:.0f} s")
    except (CutError, ValueError) as refusal:
        return "refused", f"{detail if 'detail' in locals() else ''}: {refusal}"
    except Exception as error:
        return "FAILED", f"{detail if 'detail' in locals() else ''}: {type(error).__name__}: {error}"
    return "passed", detail


def examine_users(name: str) -> tuple[str, str]:
    """Check one of the networks that are written as users write them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = NETWORKS[name]()
    sample, twin = network.sample(), NETWORKS[name]()  # a copy of what is scripted would not learn
    twin.load_state_dict(network.state_dict())
    try:
        stages = cut(twin, network.at, sample)
    except CutError as refusal:
        expected = network.refused is not None and re.search(network.refused, str(refusal))
        return ("passed" if expected else "FAILED"), f"refused: {refusal}"
    if network.refused is not None:
        return "FAILED", "cut, though something of it is lost"
    try:
        for seed in range(5):
            actual, wanted = train_step(stages, twin, sample, seed), train_step(network, network, sample, seed)
            compare(f"seed {seed}", actual, wanted, tolerance=1e-6)
    except AssertionError as error:
        return "FAILED", str(error)
    return "passed", f"cut at {', '.join(network.at)}, equal under five seeds"


def results(models: list[tuple[str, str]], jobs: int) -> Iterator[tuple[str, str, str]]:
    """Examine all families, in this process one by one, or in several."""
    if jobs == 1:
        for source, name in models:
            yield f"{source} {name}", *examine(source, name)
            gc.collect()
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        pending = {pool.submit(examine, *model): " ".join(model) for model in models}
        for done in concurrent.futures.as_completed(pending):
            yield pending[done], *done.result()


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that network families are cut exactly.")
    listing = Path(__file__).with_name("cut_coverage_models.txt")
    parser.add_argument("--models", type=Path, default=listing, help="file with a source (tv, timm) and a name a line")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="families whose line contains one of these")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    options = parser.parse_args()
    lines = [line for line in options.models.read_text().splitlines() if line.strip()]
    lines += [f"user {name}" for name in NETWORKS]
    chosen = [line.split() for line in lines if not options.only or any(text in line for text in options.only)]
    counts, slowest = {"passed": 0, "refused": 0, "FAILED": 0}, (0.0, "none")
    for i, (model, verdict, detail) in enumerate(results([(s, n) for s, n in chosen], options.jobs), start=1):
        counts[verdict] += 1
        print(f"{i:3d}/{len(chosen)} {verdict:7s} {model:40s} {detail}", flush=True)
        if "cut points in" in detail:
            slowest = max(slowest, (float(detail.split(" in ")[1].split()[0]), model))
    needed = len(chosen) - REFUSABLE * any("crossvit" in name for _, name in chosen)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), f"of {len(chosen)}; {needed} needed")
    print(f"slowest cut_points: {slowest[0]:.1f} s ({slowest[1]}), at most {SECONDS:.0f} s", flush=True)
    return 0 if counts["passed"] >= needed else 1


if __name__ == "__main__":
    sys.exit(main())
