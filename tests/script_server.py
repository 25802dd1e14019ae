"""Runs scripts in forks of one process that has imported what they import, which takes longer than most of them run.

A request is a line of JSON on standard input: ``command`` (the script's file and its arguments), ``cwd``, ``env``,
``timeout`` in seconds, and the files ``out`` and ``err`` for what it prints. The answer is a line with its exit status.
Each script has a process of its own, in which nothing ran before it.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra.compose  # noqa: F401
from omegaconf import OmegaConf
from parsed_configs import parse_once

from cleave import lightning_modules  # noqa: F401  and with it torch, Lightning, timm and torchvision


def run(request: dict[str, Any]) -> int:
    """Be the script from here on, and return its exit status."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_RDWR), number)
    signal.alarm(request["timeout"])  # without a handler it ends the process
    sys.argv = request["command"]
    script = sys.argv[0]
    sys.path[:1] = [str(Path(script).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Answer requests until standard input is closed."""
    parse_once()
    for file in (Path(__file__).resolve().parent.parent / "conf").rglob("*.yaml"):
        OmegaConf.load(file)  # and nothing is composed: each script finds the plugins of its own path
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        if (child := os.fork()) == 0:
            status = run(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    main()
