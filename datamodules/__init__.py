"""Lightning data modules: embedded digits, CIFAR-10, any folder or table of images, any data set of torchvision."""

from .base import ImageDataModule
from .feature_cache import FeatureCache, FeatureCacheError
from .sets.cifar10 import CIFAR10
from .sets.digits import Digits
from .sets.image_folder import ImageFolder
from .sets.image_table import ImageTable
from .sets.torchvision_images import TorchvisionImages
from .sources import CorruptImageError

__all__ = [
    "CIFAR10",
    "CorruptImageError",
    "Digits",
    "FeatureCache",
    "FeatureCacheError",
    "ImageDataModule",
    "ImageFolder",
    "ImageTable",
    "TorchvisionImages",
]
