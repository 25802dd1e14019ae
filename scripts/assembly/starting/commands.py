"""The commands of an installed package: ``cleave-train`` runs the script ``train``, and so on."""

from __future__ import annotations

import functools
import multiprocessing
import runpy


def run(name: str) -> None:
    """Run a script of that name as Python does."""
    runpy.run_module(f"cleave.scripts.{name}", run_name="__main__")


attack = functools.partial(run, "attack")
attribute_inference = functools.partial(run, "attribute_inference")
compare = functools.partial(run, "compare")
cut_points = functools.partial(run, "cut_points")
demo = functools.partial(run, "demo")
evaluate = functools.partial(run, "evaluate")
exits_report = functools.partial(run, "exits_report")
export = functools.partial(run, "export")
image_codecs = functools.partial(run, "image_codecs")
infer = functools.partial(run, "infer")
membership_inference = functools.partial(run, "membership_inference")
privacy_frontier = functools.partial(run, "privacy_frontier")
plan = functools.partial(run, "plan")
search_paths = functools.partial(run, "search_paths")
serve = functools.partial(run, "serve")
train = functools.partial(run, "train")

if multiprocessing.parent_process() is not None:  # a rank of ddp_spawn, which runs no more than the imports
    from cleave.lightning_modules import signals
    from cleave.scripts.assembly.starting.terminal import quiet

    quiet()
    signals.install()
