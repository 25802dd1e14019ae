"""Lightning data modules: embedded digits, CIFAR-10, and any folder of images."""

from .base import ImageDataModule
from .cifar10 import CIFAR10
from .digits import Digits
from .feature_cache import FeatureCache, FeatureCacheError
from .image_folder import ImageFolder
from .sources import CorruptImageError

__all__ = [
    "CIFAR10",
    "CorruptImageError",
    "Digits",
    "FeatureCache",
    "FeatureCacheError",
    "ImageDataModule",
    "ImageFolder",
]
