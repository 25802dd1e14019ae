"""A user's mistake is one clear line before any training time is spent."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cleave.lightning_modules.checkpoints.loading import read_checkpoint
from cleave.scripts.assembly.building import assemble, compose_config
from cleave.scripts.assembly.recipe import all_steps
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.train import train

from .training_helpers import script


def refused(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert "Epoch" not in result.stdout
    return result.stderr


def compose(*overrides: str, folder: Path):
    quiet()
    return compose_config("train", ["trainer=cpu", *overrides], folder)


def assembled(cfg):
    steps = all_steps(cfg)
    return assemble(steps[0].config, [step.config.method for step in steps])


def test_a_misspelt_config_key_fails_at_composition(tmp_path):
    told = refused(script("train", "trainer.max_epoch=3", cwd=tmp_path))
    assert "max_epoch" in told
    assert not (tmp_path / "logs").exists()


def test_a_misspelt_choice_lists_the_choices(tmp_path):
    told = refused(script("train", "experiment=digits_teachr", cwd=tmp_path))
    assert "digits_teacher" in told


def test_a_missing_value_is_named(tmp_path):
    told = refused(script("train", "experiment=bottlefit", cwd=tmp_path))
    assert "compare has no value; add compare=…" in told


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    told = refused(script("train", f"hydra.run.dir={tmp_path}/file/run", cwd=tmp_path))
    assert str(tmp_path / "file") in told


def test_a_multirun_with_subprocess_ddp(tmp_path):
    told = refused(
        script("train", "-m", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "seed=0,1", cwd=tmp_path)
    )
    assert "ddp_spawn" in told


def test_an_unknown_layer_lists_near_matches(tmp_path, teacher_file):
    cfg = compose("experiment=digits_hnd", f"base.ckpt_path={teacher_file}", "split.at=layr2", folder=tmp_path)
    with pytest.raises(Exception, match="layer2") as error:
        assembled(cfg)
    assert isinstance(error.value, ValueError) or isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize("bits", [1, 17, 31, 64])
def test_bits_outside_their_range(tmp_path, teacher_file, bits):
    cfg = compose("experiment=digits_hnd", f"base.ckpt_path={teacher_file}", f"codec.bits={bits}", folder=tmp_path)
    with pytest.raises(ValueError, match=r"bits must be 2 to 16, or 32"):
        assembled(cfg)


def test_a_base_of_another_architecture(tmp_path, teacher_file):
    cfg = compose("experiment=digits_hnd", f"base.ckpt_path={teacher_file}", "backbone.name=resnet32", folder=tmp_path)
    with pytest.raises(ValueError, match=r"another architecture.*lacks .* weights of the backbone.*layer\d\.3"):
        assembled(cfg)


@pytest.mark.parametrize("key", ["base", "teacher"])
def test_a_base_or_a_teacher_of_another_input(tmp_path, teacher_file, key):
    cfg = compose("experiment=digits_hnd", f"{key}.ckpt_path={teacher_file}", "data.image_size=16", folder=tmp_path)
    with pytest.raises(ValueError, match=f"the {key}.* was trained on the input"):
        assembled(cfg)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["experiment=digits_hnd"], r"HeadDistillation needs a teacher.*base\.ckpt_path=FILE.*backbone\.weights=FILE"),
        (["experiment=digits_hnd", "teacher.ckpt_path=FILE"], r"stay frozen with random weights.*base\.ckpt_path=FILE"),
        (["experiment=digits_teacher", "teacher.ckpt_path=FILE"], r"teacher\.ckpt_path=.* would be ignored"),
        (["experiment=digits_hnd", "base.ckpt_path=FILE", "split.at=null"], r"HeadDistillation trains .*set split\.at"),
    ],
)
def test_what_a_method_lacks_is_told_before_training(tmp_path, teacher_file, overrides, told):
    given = [override.replace("FILE", str(teacher_file)) for override in overrides]
    with pytest.raises(ValueError, match=told):
        train(compose(*given, "logger=none", folder=tmp_path))
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_a_truncated_checkpoint(tmp_path, teacher_file, keep):
    content = teacher_file.read_bytes()
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=r"damaged\.ckpt cannot be read: it is truncated"):
        read_checkpoint(damaged)


def test_a_checkpoint_with_code_is_refused(tmp_path):
    torch.save({"state_dict": {}, "harm": os.system}, tmp_path / "harm.ckpt")
    with pytest.raises(ValueError, match="weights_only"):
        read_checkpoint(tmp_path / "harm.ckpt")


def test_a_checkpoint_of_someone_else(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"backbone\.weights=FILE"):
        read_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.ckpt"):
        read_checkpoint(tmp_path / "nowhere.ckpt")


def test_a_checkpoint_of_an_older_schema(tmp_path, teacher_file):
    checkpoint = torch.load(teacher_file, weights_only=True)
    checkpoint["cleave"]["schema"] = 1
    torch.save(checkpoint, tmp_path / "old.ckpt")
    for take in (read_checkpoint, restore):
        with pytest.raises(ValueError, match=r"old\.ckpt was written by .* schema 1.*train it again"):
            take(tmp_path / "old.ckpt")


def test_a_checkpoint_that_does_not_fit_its_config(tmp_path, teacher_file):
    checkpoint = torch.load(teacher_file, weights_only=True)
    checkpoint["cleave"]["config"]["backbone"]["name"] = "resnet32"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="another architecture"):
        restore(tmp_path / "other.ckpt")


def test_bits_for_a_network_that_is_not_split(teacher_file):
    with pytest.raises(ValueError, match="not split"):
        restore(teacher_file, bits=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, teacher_file) -> Path:
    from cleave.scripts.export import export

    quiet()
    folder = tmp_path_factory.mktemp("export")
    overrides = [
        f"ckpt_path={teacher_file}",
        f"bundle={folder}/bundle",
        "trainer=cpu",
        "+trainer.enable_progress_bar=false",
    ]
    return export(compose_config("export", overrides, folder))


def test_a_bundle_with_a_changed_byte(tmp_path, bundle):
    for file in bundle.iterdir():
        copy = tmp_path / file.name / "bundle"
        shutil.copytree(bundle, copy)
        content = bytearray((copy / file.name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / file.name).write_bytes(content)
        if file.name == "manifest.json":
            told = refused(script("infer", f"bundle={copy}", "input=digits", cwd=tmp_path))
            assert "manifest" in told
        else:
            from cleave.deployment import BundleError, load_bundle

            with pytest.raises(BundleError, match=file.name):
                load_bundle(copy)


def test_an_existing_bundle_is_not_replaced_unasked(tmp_path, bundle, teacher_file):
    told = refused(script("export", f"ckpt_path={teacher_file}", f"bundle={bundle}", "trainer=cpu", cwd=tmp_path))
    assert "overwrite=true" in told


def test_an_input_that_is_not_there(tmp_path, bundle):
    told = refused(script("infer", f"bundle={bundle}", "input=nowhere.png", cwd=tmp_path))
    assert "nowhere.png" in told
