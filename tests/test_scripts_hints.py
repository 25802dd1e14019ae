"""What a command tells its user to type works: commands can be pasted, hints name keys that are there."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cleave.lightning_modules.callbacks.guard import __file__ as guard_file
from cleave.lightning_modules.command_line import in_hydra, quoted
from cleave.lightning_modules.resuming import resume_command
from cleave.reports.terminal import say, table
from cleave.scripts.assembly.building import assemble, compose_config
from cleave.scripts.assembly.hints import command
from cleave.scripts.assembly.recipe import all_steps
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.nulls import refuse_null_choices, refuse_null_groups
from cleave.scripts.assembly.starting.terminal import CONF, quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.export import export
from cleave.scripts.image_codecs import image_codecs
from cleave.scripts.train import train

from .quick_cases import some_quick
from .training_helpers import DIGITS, PLAIN, ROOT

QUIET = ["trainer=cpu", "+trainer.enable_progress_bar=false"]
ODD = "a b=c, ü [x] (y) 'q' {z} $HOME :smile: [bold]"
VALUES = [
    "plain/path-1.0+x.ckpt", "a b", "k=v", "ü", "日本", "it's", '"q"', "a,b", "[x]", "{x: y}", "$HOME", "${x}", "a${b",
    r"\${x}", "\\", "a\\", r"a\'b", r"\\'${x}", "~/x", "a:b", "1e5", "null", "True", "NaN", "1.5", ".5", "..", "./a",
    "", " a ", "a\tb", "a;b|c&d>e", "*?", "%", "@", "#", "!x", "-x", "+x", "(x)", "`x`", ODD, "${oc.env:HOME}",
]  # fmt: skip


def read_back(line: str) -> dict[str, object]:
    """The settings of a command line as the shell and Hydra hand them to a script."""
    words = [word for word in shlex.split(line) if "=" in word]
    found = {word.key_or_group: word.value() for word in OverridesParser.create().parse_overrides(words)}
    return {key: OmegaConf.to_container(OmegaConf.create({"k": found[key]}), resolve=True)["k"] for key in found}


# --- commands that can be pasted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES)
def test_whatever_a_value_holds_it_comes_through_shell_and_hydra(value):
    settings = {"ckpt_path": value, "codec.bits": 4, "inputs": [value, "b"], "x.y": None, "flag": True, "rate": 1e-3}
    assert read_back(command("export", settings)) == settings
    assert read_back(resume_command("scripts/train.py", ["seed=1"], value)) == {"seed": 1, "ckpt_path": value}


def test_a_plain_command_stays_plain():
    settings = {"ckpt_path": "logs/train/runs/2026-01-01_10-00-00-1/checkpoints/best.ckpt", "codec.bits": 4}
    line = " ".join(f"{key}={value}" for key, value in settings.items())
    assert command("export", settings) == f"python scripts/export.py {line}"
    assert quoted({"bundle": Path("/tmp/a")}) == "bundle=/tmp/a"


def test_every_printed_command_is_made_in_one_place():
    made = {"scripts/assembly/hints.py"}
    for room in ("scripts", "reports", "lightning_modules", "datamodules", "deployment", "architectures", "planning"):
        for file in (ROOT / room).rglob("*.py"):
            if re.search(r"python scripts/|scripts/\w+\.py \S+=", file.read_text()):
                assert str(file.relative_to(ROOT)) in made, f"{file} prints a command of its own"
    assert "base.ckpt_path={" not in Path(guard_file).read_text()


@pytest.fixture(scope="module")
def odd(tmp_path_factory, teacher_file) -> Path:
    """A teacher's checkpoint in a folder whose name means something to shells, to Hydra, and to what prints."""
    folder = tmp_path_factory.mktemp("odd") / ODD
    folder.mkdir()
    shutil.copy(teacher_file, folder / "best.ckpt")
    return folder / "best.ckpt"


def lines(printed: str, start: str) -> list[str]:
    return [line.removeprefix(start) for line in printed.splitlines() if line.startswith(start)]


def test_the_commands_that_scripts_print_name_the_files_that_are_there(odd, tmp_path, capsys):
    quiet()
    given, few = f"ckpt_path={in_hydra(odd)}", "+trainer.limit_test_batches=1"
    evaluate(compose_config("evaluate", [given, few, *QUIET], tmp_path / "evaluate"))
    printed = capsys.readouterr().out
    (following,) = lines(printed, "Next: python scripts/export.py ")
    assert read_back(following) == {"ckpt_path": str(odd)}
    assert f"{odd} on test" in printed

    bundle = odd.with_name("bundle")
    export(compose_config("export", [given, few, f"bundle={in_hydra(bundle)}", *QUIET], tmp_path / "export"))
    printed = capsys.readouterr().out
    (following,) = lines(printed, "Next: python scripts/infer.py ")
    assert read_back(following) == {"bundle": str(bundle), "input": "digits"}
    assert f"Bundle: {bundle}" in printed

    results = image_codecs(compose_config("image_codecs", [given, "codecs=[]"], odd.parent / "codecs"))
    assert results
    (following,) = lines(capsys.readouterr().out, "Next: python scripts/compare.py ")
    assert read_back(following) == {"inputs": [str(odd.parent / "codecs/results.json"), "RUNS"]}


def test_the_commands_that_training_prints_name_the_files_that_are_there(odd, capsys):
    quiet()
    folder = odd.parent / "run"
    few = ["trainer.max_epochs=1", *(f"+trainer.limit_{stage}_batches=1" for stage in ("train", "val", "test"))]
    train(compose_config("train", [*PLAIN, *DIGITS, *few], folder))
    printed = capsys.readouterr().out
    best = folder / "checkpoints/best.ckpt"
    assert f"Checkpoint: {best}" in printed
    (following,) = lines(printed, "Next: python scripts/export.py ")
    assert read_back(following) == {"ckpt_path": str(best)}
    (results,) = lines(printed, f"Results: {folder}/results.json (")
    assert read_back(results.removesuffix(" puts runs side by side)")) == {"inputs": [f"{folder}/results.json"]}


def test_nothing_printed_is_markup(capsys):
    say(ODD)
    table(ODD, [(ODD, "[red]1[/red]")], ("[b]", ":smile:"))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{ODD}\n\n{ODD}\n")
    assert f"│ {ODD} │" in printed
    assert "[red]1[/red]" in printed
    assert ":smile:" in printed.splitlines()[4]


# --- trust --------------------------------------------------------------------------------------------------------


def changed(file: Path, to: Path, **settings: object) -> Path:
    checkpoint = torch.load(file, weights_only=True)
    config = OmegaConf.create(checkpoint["cleave"]["config"])
    for key, value in settings.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    checkpoint["cleave"]["config"] = OmegaConf.to_container(config)
    torch.save(checkpoint, to)
    return to


def assembled(*overrides: str, folder: Path) -> None:
    steps = all_steps(compose_config("train", ["trainer=cpu", *overrides], folder))
    assemble(steps[0].config, [step.config.method for step in steps])


def test_the_hint_of_trust_names_the_key_of_this_command(tmp_path, teacher_file):
    own = changed(teacher_file, tmp_path / "own.ckpt", backbone__kwargs={"_target_": "builtins.dict"})
    commands = {
        "base.trust_checkpoint=true": (f"base.ckpt_path={own}",),
        "teacher.trust_checkpoint=true": (f"base.ckpt_path={teacher_file}", f"teacher.ckpt_path={own}"),
    }
    for hint, given in commands.items():
        overrides = [*given, "experiment=digits_hnd"]
        with pytest.raises(ValueError, match=rf"names builtins\.dict, .* add {re.escape(hint)} "):
            assembled(*overrides, folder=tmp_path / "run")
        assembled(*overrides, hint, folder=tmp_path / "run")
    options = [f"ckpt_path={own}", "split=val", "+trainer.limit_val_batches=1", *QUIET]
    with pytest.raises(ValueError, match=r" add trust_checkpoint=true "):
        evaluate(compose_config("evaluate", options, tmp_path / "evaluate"))


def test_the_next_command_vouches_where_the_checkpoint_names_code_of_ones_own(tmp_path, teacher_file, capsys):
    own = changed(teacher_file, tmp_path / "own.ckpt", backbone__kwargs={"_target_": "builtins.dict"})
    options = [f"ckpt_path={own}", "split=val", "+trainer.limit_val_batches=1", "trust_checkpoint=true", *QUIET]
    evaluate(compose_config("evaluate", options, tmp_path / "evaluate"))
    (following,) = lines(capsys.readouterr().out, "Next: python scripts/export.py ")
    assert read_back(following) == {"ckpt_path": str(own), "trust_checkpoint": True}


def test_what_is_not_built_again_needs_no_trust(tmp_path, teacher_file):
    loss = {"_target_": "my_package.Loss"}
    term = {"_target_": "cleave.lightning_modules.Term", "loss": loss, "of": ["student/logits", "labels"]}
    file = changed(
        teacher_file,
        tmp_path / "own.ckpt",
        training__optimizer___target_="timm.optim.Lamb",
        training__scheduler___target_="my_package.Schedule",
        method__loss=loss,
        method__extra_terms={"own": term},
    )
    options = [f"ckpt_path={file}", "+trainer.limit_test_batches=1", *QUIET]
    assert evaluate(compose_config("evaluate", options, tmp_path / "evaluate")).keys() >= {"test/acc", "test/loss"}
    assert export(compose_config("export", [*options, f"bundle={tmp_path}/bundle"], tmp_path / "export"))
    assembled("experiment=digits_hnd", f"base.ckpt_path={file}", folder=tmp_path / "run")
    with pytest.raises(ValueError, match=r"my_package\.Data.* add trust_checkpoint=true"):
        restore(changed(teacher_file, tmp_path / "data.ckpt", data___target_="my_package.Data"))


# --- groups set to null -------------------------------------------------------------------------------------------


def refused(script: str, *overrides: str) -> str:
    """What is said of overrides, as in a running job; empty where they may pass."""
    try:
        refuse_null_choices(script, overrides)
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose(script, list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            refuse_null_groups(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]))
    except ValueError as error:
        return str(error)
    finally:
        HydraConfig.instance().cfg = None
    return ""


NULLS = {
    "train": "base=null teacher=null split=null feature_cache=null training.optimizer=null"
    " ~teacher ~exits.head ~links ~host",
    "infer": "exits=null",
    "export": "recalibrate=null links=null",
    "evaluate": "codec=null",
    "compare": "backbone=null",
    "exits_report": "timing=null placement=NULL",
    "image_codecs": "data=null",
    "plan": "device=null server=null options=null",
    "search_paths": "base=null search=null search.reward=null search.algorithm=null ~host",
    "attack": "attack=null information=null",
    "privacy_frontier": "frontier=null wanted=null frontier.strength=null attack=null ~information",
}
GROUPS = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra")
PLAN_MAY_PASS = "device.power=null device_profile=null"
MAY_PASS = "~logger ~callbacks callbacks.progress=null training.scheduler=null exits.policy=null"


# A group, one within a group, one without, an empty optional one; and of each other script one.
FORMS = {"base=null", "training.optimizer=null", "~teacher", "~exits.head", "search.reward=null", "placement=NULL"}


def is_quick(case: tuple[str, str]) -> bool:
    script, override = case
    return override in FORMS if script in ("train", "exits_report") else override == NULLS[script].split()[-1]


@pytest.mark.parametrize(
    ("script", "override"), some_quick([(name, word) for name in NULLS for word in NULLS[name].split()], is_quick)
)
def test_a_group_set_to_null_is_one_sentence_with_the_keys_to_set(script, override):
    said = refused(script, override)
    key = override.strip("~").partition("=")[0]
    assert said.startswith(f"{override} takes away a whole group, which is read")
    assert re.search(rf"set {re.escape(key)}\.\w+", said)
    assert "\n" not in said


@pytest.mark.parametrize(("script", "group"), [*(("train", group) for group in GROUPS), ("evaluate", "logger")])
def test_a_choice_of_null_is_one_sentence_with_the_choices(script, group):
    said = refused(script, f"{group}=null")
    assert said == f"{group}=null chooses nothing: leave it out, or take one of {', '.join(choices(group))}"


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.mark.parametrize("override", MAY_PASS.split())
def test_a_group_that_may_be_null_passes(override):
    assert refused("train", override) == ""


@pytest.mark.parametrize("override", PLAN_MAY_PASS.split())
def test_what_a_plan_may_do_without_passes(override):
    assert refused("plan", override) == ""
