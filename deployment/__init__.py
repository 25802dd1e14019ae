"""What a device or a server needs: bundles, codecs, preprocessing and export. Imports nothing of the other rooms."""

from .bundle import Bundle, Partition, load_bundle
from .codec import CODECS, Codec, FloatCodec, UniformCodec, codec_from_dict
from .export import Part, check_target, export_bundle
from .files import BundleError, FileEntry
from .inference import Pipeline, Result
from .manifest import Manifest, PartitionSpec, TensorSpec, read_manifest, write_manifest
from .packing import CodecError, check_bits, pack_bits, packed_bytes, unpack_bits, zstd_bytes
from .parity import Parity, ParityError
from .preprocess import ImageError, ImageInput, open_image
from .torchscript import load_torchscript, save_torchscript

__all__ = [
    "CODECS",
    "Bundle",
    "BundleError",
    "Codec",
    "CodecError",
    "FileEntry",
    "FloatCodec",
    "ImageError",
    "ImageInput",
    "Manifest",
    "Parity",
    "ParityError",
    "Part",
    "Partition",
    "PartitionSpec",
    "Pipeline",
    "Result",
    "TensorSpec",
    "UniformCodec",
    "check_bits",
    "check_target",
    "codec_from_dict",
    "export_bundle",
    "load_bundle",
    "load_torchscript",
    "open_image",
    "pack_bits",
    "packed_bytes",
    "read_manifest",
    "save_torchscript",
    "unpack_bits",
    "write_manifest",
    "zstd_bytes",
]
