"""What the documents name exists, and the commands that they show compose; nothing is built for it."""

import ast
import functools
import itertools
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FOLDERS = [path.name for path in ROOT.iterdir() if path.is_dir() and (path.name[0] != "." or path.name == ".types")]
FOLDERS = sorted({*FOLDERS, "reports"} - {"data", "logs", "bundles", "build", "dist", "wandb", "feature_cache"})
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if (ROOT / f"conf/{path.stem}.yaml").exists())
# In a path these stand for what a reader puts in.
PLACEHOLDERS = {"DIR", "FILE", "NAME", "ROOM", "LAYER", "GROUP"}
# `key=value`, `+key=value`, `+group@place=choice` and `~key`; an environment variable is none of them.
OVERRIDE = re.compile(r"[+~]{0,2}[a-z_][\w/.@-]*=.*|~[a-z_][\w/.@]*", re.DOTALL)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def prose(document: str) -> str:
    return FENCE.sub("", (ROOT / document).read_text())


def fences(document: str, language: str) -> list[str]:
    return [text for found, text in FENCE.findall((ROOT / document).read_text()) if found == language]


def spans(document: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


# --- paths ------------------------------------------------------------------------------------------------------------


def named_paths(document: str) -> set[str]:
    """The paths from the root of the repository that a document names in backticks, in links and in commands."""
    links = re.findall(r"\]\(([^)#\s]+)\)", prose(document))
    found = {str((ROOT / document).parent.joinpath(link).relative_to(ROOT)) for link in links if "://" not in link}
    words = [word for span in spans(document) for word in span.split()]
    words += [word for text in fences(document, "bash") for word in text.split() if word.endswith(".py")]
    for word in (word.strip("'\",;()") for word in words):
        first, *rest = word.split("/")
        if re.fullmatch(r"[\w./-]+", word) and ((rest and first in FOLDERS) or word.endswith((".md", ".toml"))):
            found.add(word)
        elif word.endswith(".py") and not rest:
            found.add(f"scripts/{word}")
    return {path for path in found if not PLACEHOLDERS & set(re.split(r"[\W_]+", path))}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document):
    assert not [path for path in sorted(named_paths(document)) if not (ROOT / path).exists()]


def test_sections_that_links_lead_to_exist():
    for document in DOCUMENTS:
        titles = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert set(re.findall(r"\]\(#([^)]+)\)", prose(document))) <= anchors


# --- names in Python --------------------------------------------------------------------------------------------------


def named_objects(document: str) -> set[str]:
    """The objects that a document names by ``cleave.ROOM.NAME``, or imports in an example."""
    found = set(re.findall(r"\bcleave(?:\.\w+){2,}", (ROOT / document).read_text()))
    for node in itertools.chain.from_iterable(ast.walk(ast.parse(text)) for text in fences(document, "python")):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cleave."):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if not PLACEHOLDERS & set(name.split("."))}


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or stands in one; read, not imported."""
    place, rest = ROOT, name.split(".")[1:]
    while rest and (place / rest[0]).is_dir():
        place /= rest.pop(0)
    if rest and (place / f"{rest[0]}.py").exists():
        place /= f"{rest.pop(0)}.py"
    text = (place / "__init__.py" if place.is_dir() else place).read_text()
    return not rest or bool(re.search(rf"\b{rest[0]}\b", text))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_object_that_a_document_names_exists(document):
    assert not [name for name in sorted(named_objects(document)) if not exists(name)]


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(document: str) -> list[tuple[str, ...]]:
    """The commands of a document: a script's name, empty where none is named, and its overrides."""
    lines = [line for text in fences(document, "bash") for line in shell_lines(text)]
    return commands_in([*lines, *spans(document)])


def commands_in(lines: list[str]) -> list[tuple[str, ...]]:
    """The commands among some lines."""
    found = []
    for words in (split_words(line) for line in lines):
        script = next((Path(word).stem for word in words if word.endswith(".py")), "")
        overrides = [word for word in words if OVERRIDE.fullmatch(word)]
        if overrides and script in ("", *SCRIPTS) and len(words) == len(overrides) + len(prefix(words)):
            found += [(script, *choice) for choice in alternatives(overrides, sweep="-m" in words)]
    return list(dict.fromkeys(found))


def shell_lines(text: str) -> list[str]:
    """The commands of a block: a line that ends in a backslash, or inside a quotation, goes on in the next."""
    lines, line = [], ""
    for each in text.replace("\\\n", " ").splitlines():
        line = f"{line} {each}".strip()
        if split_words(line) or not line:
            lines.append(line)
            line = ""
    return lines


def split_words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # an apostrophe in a span that is no command
        return []


def prefix(words: list[str]) -> list[str]:
    """What stands before a command's overrides."""
    return list(itertools.takewhile(lambda word: word in ("python", "-m") or word.endswith(".py"), words))


def alternatives(overrides: list[str], sweep: bool) -> list[tuple[str, ...]]:
    """Each command that ``key=a|b`` stands for; of a sweep over ``a,b`` too."""
    chosen = []
    for override in overrides:
        key, equals, value = override.replace("…", "x").partition("=")
        values = re.split(r"[|,]" if sweep else r"\|", value) if "{" not in value else [value]
        chosen.append([key + equals + each for each in values])
    return list(itertools.product(*chosen))


@pytest.fixture(scope="module")
def settings():
    """Compose a script's config, as plain containers; what nobody overrides only once."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield functools.cache(lambda script, *overrides: OmegaConf.to_container(compose(script, list(overrides))))


def mistake(settings, script: str, *overrides: str) -> str:
    """What is wrong with a command, empty where it composes; one without a script's name goes to any script."""
    scripts = [script] if script else ["train", *SCRIPTS]
    if len(overrides) == 1 and (single := re.fullmatch(r"([\w.]+)=([][\w,./]*)", overrides[0])):
        key, value = single.groups()
        if (ROOT / "conf" / key).is_dir():  # of which other tests compose all choices
            return "" if (ROOT / f"conf/{key}/{value}.yaml").exists() else f"conf/{key} has no {value}.yaml"
        if any(has(settings(name), key.split(".")) for name in scripts):
            return ""
    errors = []
    for name in scripts:
        try:
            settings(name, *overrides)
        except Exception as error:
            errors.append(str(error).splitlines()[0])
        else:
            return ""
    return errors[0]


def has(node, keys: list[str]) -> bool:
    return not keys or (isinstance(node, dict) and keys[0] in node and has(node[keys[0]], keys[1:]))


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if commands(document)])
def test_every_command_composes(document, settings):
    mistakes = {" ".join(command).strip(): mistake(settings, *command) for command in commands(document)}
    assert not {command: found for command, found in mistakes.items() if found}


def test_every_preset_begins_with_a_command_that_composes(settings):
    mistakes = {}
    for preset in sorted((ROOT / "conf/experiment").glob("*.yaml")):
        (command,) = re.findall(r"python scripts/train\.py (.*)", preset.read_text())
        words = [word for word in shlex.split(command) if word != "…"]
        assert f"experiment={preset.stem}" in words
        if found := mistake(settings, "train", *words):
            mistakes[preset.name] = found
    assert not mistakes


def test_a_command_that_does_not_compose_is_found(settings):
    for wrong in ("codec.bit=4", "method=head_destillation", "training.optimizer.momentum=0.9"):
        assert mistake(settings, "train", wrong), wrong
    assert len(commands("README.md")) > 60  # nothing goes unnoticed for another form of the document
