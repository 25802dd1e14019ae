"""BatchNorm over all ranks, for networks whose BatchNorm does more than normalise."""

from __future__ import annotations

from pytorch_lightning.plugins.layer_sync import LayerSync
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(LayerSync):
    """Synchronises BatchNorm while training on several GPUs, as ``trainer.plugins``.

    torch's own conversion, behind ``Trainer(sync_batchnorm=True)``, replaces timm's ``BatchNormAct2d`` by a layer that
    never calls its activation. This one converts by timm, and puts the original layers back afterwards.
    """

    def __init__(self) -> None:
        self.replaced: dict[str, nn.Module] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace every BatchNorm layer."""
        self.replaced = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
        return convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Put the original layers back, with what the synchronised ones have learned."""
        for name, original in self.replaced.items():
            current = model.get_submodule(name)
            original.load_state_dict(current.state_dict())
            model.set_submodule(name, original.train(current.training))
        self.replaced = {}
        return model
