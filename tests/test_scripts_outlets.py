"""Commands whose output nobody reads, that lack a package, or whose command line Hydra cannot read."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from cleave.scripts.assembly.starting.quoting import unreadable
from cleave.scripts.assembly.starting.terminal import is_users_mistake

from .training_helpers import ROOT, python_path, script

PRINTS = {
    "print": "print('word')",
    "unbuffered": "print('word')",
    "flush": "print('word', flush=True)",
    "say": "from cleave.reports.terminal import say; say('word')",
    "log": """
import logging
from cleave.scripts.assembly.starting import outlets
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
outlets.heed(logging.getLogger().handlers)
logging.info('word')
""",
    "signal": "print('word'); os.kill(os.getpid(), signal.SIGTERM)",
}
CODE = """
import os, signal, sys
from cleave.scripts.assembly.starting.terminal import start
def main():
{body}
start(main)
"""


def printed(kind: str, out: int, folder: Path) -> tuple[int, str]:
    body = "\n".join(f"    {line}" for line in PRINTS[kind].strip().splitlines())
    command = [sys.executable, "-c", CODE.format(body=body)]
    unbuffered = "1" if kind == "unbuffered" else ""  # which tells of what fails at once, or at the end
    env = {**os.environ, "PYTHONPATH": python_path(), "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.run(command, cwd=folder, env=env, stdout=out, stderr=subprocess.PIPE, text=True, timeout=100)
    return process.returncode, process.stderr


def unread_pipe() -> int:
    """A pipe whose reader has gone."""
    reader, out = os.pipe()
    os.close(reader)
    return out


@pytest.mark.parametrize("kind", PRINTS)
def test_a_command_whose_reader_has_gone_ends_quietly(kind, tmp_path):
    out = unread_pipe()
    try:
        status, err = printed(kind, out, tmp_path)
    finally:
        os.close(out)
    if kind == "signal":
        assert status == 143
        assert err.startswith("Stopped by SIGTERM.\n")
        assert len(err.splitlines()) == 2
    else:
        assert (status, err) == (141, "")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a disk that is always full")
@pytest.mark.parametrize("kind", PRINTS)
def test_a_full_disk_is_named_in_one_sentence(kind, tmp_path):
    with Path("/dev/full").open("w") as out:
        status, err = printed(kind, out.fileno(), tmp_path)
    assert status == (143 if kind == "signal" else 1)
    lines = [line for line in err.splitlines() if "Stopped by" not in line and "It did not finish" not in line]
    assert lines == ["OSError: what this command prints cannot be written: No space left on device"]


def test_a_mistake_has_its_status_where_nobody_reads_of_it(tmp_path):
    out = unread_pipe()
    command = [sys.executable, str(ROOT / "scripts/infer.py"), "bundle=x", "inputs=y"]
    env = {**os.environ, "PYTHONPATH": python_path()}
    process = subprocess.run(command, cwd=tmp_path, env=env, stdout=out, stderr=out, timeout=100)
    os.close(out)
    assert process.returncode == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_outlets_that_a_shell_has_closed_stand_in_no_command_s_way(tmp_path):
    env = {**os.environ, "PYTHONPATH": python_path()}
    body = "    from cleave.reports.terminal import say; say('word'); print('word'); print('word', file=sys.stderr)"
    (tmp_path / "run.py").write_text(CODE.format(body=body))
    line = f"{shlex.quote(sys.executable)} run.py >&- 2>&-"
    assert subprocess.run(line, shell=True, cwd=tmp_path, env=env, timeout=100).returncode == 0


@pytest.mark.parametrize("given", [None, "INFO"])
def test_what_grpc_prints_is_left_out_unless_asked_for(given, tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "GRPC_VERBOSITY"}
    env |= {"PYTHONPATH": python_path(), **({} if given is None else {"GRPC_VERBOSITY": given})}
    command = [sys.executable, "-c", CODE.format(body="    print(os.environ['GRPC_VERBOSITY'])")]
    process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert process.stdout == f"{given or 'NONE'}\n"


# --- packages that are missing ----------------------------------------------------------------------------------------


def test_a_missing_extra_is_a_sentence_and_a_broken_import_is_a_fault():
    for error in (
        ImportError("frames need the extra `video`: pip install opencv-python-headless"),
        ImportError("Server needs the extra `serve`: pip install grpcio protobuf (No module named 'grpc')"),
        ImportError("the Gaussian process needs scikit-learn, which the extra `search` brings"),
    ):
        assert is_users_mistake(error)
    for other in (
        ImportError("cannot import name 'extra' from 'x'"),
        ImportError("the extra function"),
        ModuleNotFoundError("No module named 'grpc'"),
        ModuleNotFoundError("x needs the extra `serve`"),
    ):
        assert not is_users_mistake(other)


@pytest.mark.parametrize(
    ("name", "given", "package", "extra"),
    [
        ("infer", ["input=1"], "cv2", "video"),
        ("infer", ["input=digits", "server=127.0.0.1:1"], "grpc", "serve"),
        ("serve", [], "grpc", "serve"),
    ],
)
def test_a_command_without_a_package_says_which_extra_brings_it(name, given, package, extra, tmp_path):
    (tmp_path / "without").mkdir()
    (tmp_path / f"without/{package}.py").write_text(f"raise ModuleNotFoundError('not here', name='{package}')")
    path = python_path(tmp_path / "without")
    result = script(name, "bundle=nowhere", *given, cwd=tmp_path, PYTHONPATH=path)
    assert result.returncode == 1
    first, second = result.stderr.splitlines()
    assert first.startswith("ImportError: ")
    assert f"the extra `{extra}`: pip install" in first
    assert second.startswith("HYDRA_FULL_ERROR=1")


# --- command lines that cannot be read --------------------------------------------------------------------------------


def advice(*words: str) -> str | None:
    for word in words:
        if not word.startswith("-"):
            try:
                OverridesParser.create().parse_overrides([word])
            except OverrideParseException as error:
                return unreadable(error, words)
    return None


@pytest.mark.parametrize(
    "value",
    [
        "sp dir/bild ü.png",
        "sp ace/my bündle",
        "[::1]:8001",
        "ü",
        "a=b.png",
        "it's.png",
        "a(b",
        'a"b ü',
        "C:\\ü",
        "ü ${x}",
        "{a",
        "a}b",
        "日本.png",
    ],
)
def test_a_value_that_cannot_be_read_is_shown_as_it_is_to_be_typed(value):
    word = f"input={value}"
    told = advice("bundle=x", "--multirun", word)
    assert told is not None
    assert told.startswith(f"{word} cannot be read: quote the value within the shell's quotes, ")
    (typed,) = shlex.split(told.partition("shell's quotes, ")[2])
    assert OverridesParser.create().parse_override(typed).value() == value.replace("${", r"\${")


def test_lists_and_words_without_a_value_have_advice_of_their_own():
    for word in ("bundle=[a ü,b]", "onward.servers={cloud: ü}"):
        assert "quotation marks around each text" in str(advice(word))
    assert advice("input=x", "digits") == "digits cannot be read: a setting is written KEY=VALUE"
    assert unreadable(ValueError("x"), ["a ü"]) is None


def test_a_path_with_spaces_and_umlauts_is_one_sentence(tmp_path):
    for name, word, typed in (
        ("infer", "input=sp dir/bild ü.png", """'input="sp dir/bild ü.png"'"""),
        ("infer", "server=[::1]:8001", """'server="[::1]:8001"'"""),
        ("train", "data.root=ü", """'data.root="ü"'"""),
    ):
        result = script(name, "bundle=x", word, cwd=tmp_path)
        assert result.returncode == 1
        first, second = result.stderr.splitlines()
        words = f"{word} cannot be read: quote the value within the shell's quotes, {typed}"
        assert first == f"OverrideParseException: {words}"
        assert second.startswith("HYDRA_FULL_ERROR=1")
