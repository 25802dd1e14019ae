"""Backbones by name, and the weights that they start from."""

from cleave.architectures.backbones.factory import Backbone, create_backbone

__all__ = ["Backbone", "create_backbone"]
