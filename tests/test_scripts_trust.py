"""A checkpoint's config runs no code but Cleave's, unless the user vouches for the file."""

import pytest
import torch

from cleave.architectures.described import GROUPS
from cleave.lightning_modules.checkpoints.trust import check_targets
from cleave.scripts.assembly.restoring import restore


def test_a_checkpoint_cannot_name_code_of_its_own(tmp_path, teacher_file):
    victim = tmp_path / "victim"
    victim.write_text("")
    checkpoint = torch.load(teacher_file, weights_only=True)
    checkpoint["cleave"]["config"]["backbone"]["source"] = {"_target_": "pathlib.Path.unlink", "self": str(victim)}
    torch.save(checkpoint, tmp_path / "harm.ckpt")
    with pytest.raises(ValueError, match=r"names pathlib\.Path\.unlink.*trust_checkpoint=true"):
        restore(tmp_path / "harm.ckpt")
    assert victim.exists()


@pytest.mark.parametrize(
    "target",
    [
        "torch.load",
        "numpy.load",
        "cleave.architectures.backbones.weights.torch.load",
        "cleave.datamodules.sets.image_folder.Path",
        "my_package.Net",
    ],
)
def test_what_is_not_ours_is_refused_however_it_is_reached(target):
    with pytest.raises(ValueError, match=target):
        check_targets({"data": [{"deep": {"_target_": target}}]}, "x.ckpt", trusted=False)
    check_targets({"data": [{"deep": {"_target_": target}}]}, "x.ckpt", trusted=True)


def test_what_presets_name_is_allowed(teacher_file):
    config = torch.load(teacher_file, weights_only=True)["cleave"]["config"]
    check_targets({key: config[key] for key in (*GROUPS, "data", "method", "training")}, "x.ckpt", trusted=False)
