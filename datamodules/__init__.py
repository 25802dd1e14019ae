"""Lightning data modules: digits, CIFAR-10, any folder or table of images, data sets of torchvision, Hugging Face."""

from .base import ImageDataModule
from .caching.feature_cache import FeatureCache, FeatureCacheError
from .sets.cifar10 import CIFAR10
from .sets.digits import Digits
from .sets.hugging_face import HuggingFaceImages
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
    "HuggingFaceImages",
    "ImageDataModule",
    "ImageFolder",
    "ImageTable",
    "TorchvisionImages",
]
