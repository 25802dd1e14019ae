"""What a command is given: paths with `~`, values of another type, keys that nothing reads, modules of one's own."""

import copy
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.given import keys, paths
from cleave.scripts.assembly.given.value_types import check_values
from cleave.scripts.assembly.starting.terminal import CONF

from .training_helpers import PLAIN, load, script, small

# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("data.root=~/x", "data.root=/home/me/x"),
        ("data.root='~/x y'", "data.root='/home/me/x y'"),
        ("hydra.run.dir=~", "hydra.run.dir=/home/me"),
        ("inputs=[~/a,~/b]", "inputs=[/home/me/a,/home/me/b]"),
        ("+x={a: ~/y, b: 1}", "+x={a: /home/me/y, b: 1}"),
        ("~training.scheduler.T_max", "~training.scheduler.T_max"),
        ("~method", "~method"),
        ("a=b~c", "a=b~c"),
        ("a=~nobody-here/x", "a=~nobody-here/x"),
    ],
)
def test_a_tilde_is_the_home_folder_where_a_value_begins(given, expanded, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.expanded_override(given) == expanded


def test_a_tilde_in_a_preset_is_expanded_whatever_the_key(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = OmegaConf.create(
        {"any": {"thing": ["~/a", 1, None]}, "lean": "${any.thing.0}/b", "note": "a ~/b", "m": "???"}
    )
    paths.settle(cfg)
    assert OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False) == {
        "any": {"thing": ["/home/me/a", 1, None]},
        "lean": "/home/me/a/b",
        "note": "a ~/b",
        "m": "???",
    }


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data=image_folder data.root=pictures", "data.root"),
        ("data=image_table data.table=pictures", "data.table"),
        ("data=torchvision data.dataset._target_=x.Y +data.dataset.root=pictures", "data.dataset.root"),
    ],
)
def test_the_place_of_the_images_is_kept_whole(override, key, tmp_path):
    cfg = compose_config("train", override.split(), tmp_path)
    assert OmegaConf.select(cfg, key) == str(Path("pictures").absolute())


# --- values -----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "trainer.max_epochs=ten": "a whole number or null, got 'ten'",
    "trainer.max_epochs=1.5": "a whole number or null, got 1.5",
    "trainer.max_epochs=true": "a whole number or null, got True",
    "trainer.gradient_clip_val=big": "a number or null, got 'big'",
    "trainer.accumulate_grad_batches=two": "a whole number, got 'two'",
    "+trainer.limit_train_batches=half": "a number or null, got 'half'",
    "data.batch_size=ten": "a whole number, got 'ten'",
    "data.drop_last=no": "true or false, got 'no'",
    "data.num_workers=null": "a whole number, got None",
    "training.optimizer.lr=fast": "a number, got 'fast'",
    "+training.optimizer.betas=x": "a list, got 'x'",
    "training.compile=on": "true or false, got 'on'",
    "bottleneck.channels=four": "a whole number, got 'four'",
    "callbacks.progress.refresh_rate=often": "a whole number, got 'often'",
    "train=no": "true or false, got 'no'",
    "seed=x": "a whole number or null, got 'x'",
    "feature_cache.use=yes": "true or false, got 'yes'",
    "host.trust_checkpoint=yes": "true or false, got 'yes'",
    "extras.print_config=please": "true or false, got 'please'",
    "links.kernel=three": "a whole number, got 'three'",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_value_of_another_type_names_its_key(override, tmp_path):
    cfg = compose_config("train", [override], tmp_path)
    key = override.lstrip("+").partition("=")[0]
    with pytest.raises(TypeError) as error:
        check_values(cfg, CONF)
    assert str(error.value) == f"{key} must be {MISTAKES[override]}"


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer=ddp"],
        ["trainer.devices=[0,1]", "trainer.max_time=00:01:00:00", "+trainer.limit_train_batches=0.5"],
        ["callbacks=ema"],
        ["callbacks=early_stopping", "logger=wandb"],
        ["experiment=entropic_student", "trainer.max_epochs=null", "training.optimizer.lr=1"],
        ["links.path=[conv1,null,null,layer3]", "links.local_blocks=[conv1,layer1]", "host.image_size=[8,8]"],
        ["data=image_folder", "data.root=x", "data.image_size=[8,8]", "data.drop_last=1"],
        ["backbone=custom", "backbone.network._target_=no.such.Network"],
    ],
)
def test_what_may_be_given_passes(overrides, tmp_path):
    check_values(compose_config("train", overrides, tmp_path), CONF)


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The config of a run without overrides, which no test changes."""
    return compose_config("train", [], tmp_path_factory.mktemp("plain"))


def test_the_keys_that_overrides_add():
    given = ["+a.b=1", "++c=2", "+d={e: 1, f: {g: 2}}", "+experiment=x", "+method@steps.a.method=y", "h=3", "~i"]
    assert list(keys.added(given)) == ["a.b", "c", "d.e", "d.f.g", "experiment"]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optimizer.lr", "training.optimizer.lr"),
        ("lr", "training.optimizer.lr"),
        ("method.optimizer.lr", "training.optimizer.lr"),
        ("batch_size", "data.batch_size"),
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("split.att", "split.at"),
        ("max_epoks", "trainer.max_epochs"),
        ("methd", "method"),
        ("optimizer", "training.optimizer"),
    ],
)
def test_a_key_that_was_meant(key, meant, plain):
    known = keys.known_keys(plain)
    assert meant in keys.meant(key, known)


@pytest.mark.parametrize(
    ("added", "read"),
    [
        ("optimizer.lr", False),
        ("epochs", False),
        ("exits.count", True),
        ("seed", True),
        ("split.att", False),
        ("feature_cache.uses", False),
        ("channel.rate", False),
        ("base.ckpt", False),
        ("host.ckpt", False),
        ("host.backbone.name", False),
        ("links.path", True),
        ("trainer.max_steps", True),
        ("training.optimizer.momentum", True),
        ("backbone.kwargs.img_size", True),
        ("inserts.layer2", True),
        ("callbacks.mine._target_", True),
        ("codec.at.layer1.bits", True),
        ("beta", True),
    ],
)
def test_which_added_keys_are_read(added, read, plain):
    cfg = copy.deepcopy(plain)
    for key, value in (("method.leans", "${beta}"), (added, 1)):
        OmegaConf.update(cfg, key, value, force_add=True)
    files = {"": "train", added.partition(".")[0]: "default"}
    assert (keys._is_read(cfg, added) or keys._stands_in(added, files, Path(CONF))) == read


# --- at the terminal --------------------------------------------------------------------------------------------------


def refused(*arguments: str, folder: Path, name: str = "train", **env: str) -> str:
    result = script(name, *arguments, cwd=folder, **env)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("given", ["optimizer.lr=0.1", "+optimizer.lr=0.1"])
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(given, tmp_path):
    told = refused(given, folder=tmp_path)
    assert "training.optimizer.lr" in told
    assert "append" not in told  # Hydra's advice, which would do nothing


def test_a_key_of_the_hosts_backbone_is_known_once_that_is_chosen():
    message = "Key 'host.backbone.nam' is not in struct"
    chosen = ["+backbone@host.backbone=timm", "host.backbone.nam=vit"]
    assert "host.backbone.name" in keys.explained(message, "train", CONF, chosen)


def test_a_type_error_names_the_key_and_says_where_a_trace_is_to_be_had(tmp_path):
    told = refused("trainer.max_epochs=ten", folder=tmp_path)
    assert "trainer.max_epochs must be a whole number" in told
    assert "HYDRA_FULL_ERROR=1" in told


def test_modules_in_the_working_directory_import_and_a_moved_data_set_is_pointed_out(tmp_path):
    """A run with a module and pictures of its own folder is evaluated from elsewhere, before and after a move."""
    from PIL import Image

    home = tmp_path / "home"
    for split in ("train", "test"):
        for shade, name in enumerate(("dark", "light")):
            folder = home / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("L", (8, 8), 200 * shade + number).save(folder / f"{number}.png")
    (home / "my_network.py").write_text(
        "from torch import nn\n\n\nclass Mine(nn.Sequential):\n    def __init__(self, num_classes, in_channels):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))\n"
    )
    overrides = [*PLAIN, *small("PlainNet"), "data=image_folder", "data.root=pictures", "data.augment=none"]
    overrides += ["backbone.network._target_=my_network.Mine", "trainer.max_epochs=1", "data.batch_size=2"]
    overrides += ["backbone.image_input.height=8", "backbone.image_input.width=8"]
    run = script("train", *overrides, "hydra.run.dir=~/run", cwd=home, HOME=str(home))
    assert run.returncode == 0, run.stdout + run.stderr
    checkpoint = home / "run/checkpoints/best.ckpt"
    assert load(checkpoint)["cleave"]["config"]["data"]["root"] == str(home / "pictures")
    evaluate = ["ckpt_path=~/run/checkpoints/best.ckpt", "trust_checkpoint=true", "trainer=cpu", "hydra.run.dir=~/e"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {"HOME": str(home), "PYTHONPATH": os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])}
    run = script("evaluate", *evaluate, cwd=elsewhere, **environment)
    assert run.returncode == 0, run.stdout + run.stderr
    (home / "pictures").rename(home / "moved")
    told = refused(*evaluate, folder=elsewhere, name="evaluate", **environment)
    assert f"{home}/pictures" in told
    assert "data.root=DIR" in told
    run = script("evaluate", *evaluate, "data.root=~/moved", cwd=elsewhere, **environment)
    assert run.returncode == 0, run.stdout + run.stderr
