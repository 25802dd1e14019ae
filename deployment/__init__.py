"""What a device or a server needs: bundles, codecs, preprocessing and export. Imports nothing of the other rooms."""

from .bundle import Bundle, Partition, load_bundle
from .codec import CODECS, Codec, CodesCodec, FloatCodec, UniformCodec, codec_from_dict
from .entropy_codec import EntropyCodec, integer_frequencies
from .export import Part, check_target, export_bundle
from .feature_codecs import CODINGS, SparseCodec, TiledImageCodec, ZstdCodec, code_codec
from .files import BundleError, FileEntry
from .image_codecs import IMAGE_CODECS, ImageCodec, JPEGCodec, PNGCodec, WebPCodec, image_codec
from .inference import Pipeline, Result
from .manifest import Manifest, PartitionSpec, TensorSpec, read_manifest, write_manifest
from .packing import FLOAT_BITS, CodecError, check_bits, pack_bits, packed_bytes, unpack_bits, zstd_bytes
from .parity import Parity, ParityError
from .preprocess import ImageError, ImageInput, open_image
from .torchscript import load_torchscript, save_torchscript

__all__ = [
    "CODECS",
    "CODINGS",
    "FLOAT_BITS",
    "IMAGE_CODECS",
    "Bundle",
    "BundleError",
    "Codec",
    "CodecError",
    "CodesCodec",
    "EntropyCodec",
    "FileEntry",
    "FloatCodec",
    "ImageCodec",
    "ImageError",
    "ImageInput",
    "JPEGCodec",
    "Manifest",
    "PNGCodec",
    "Parity",
    "ParityError",
    "Part",
    "Partition",
    "PartitionSpec",
    "Pipeline",
    "Result",
    "SparseCodec",
    "TensorSpec",
    "TiledImageCodec",
    "UniformCodec",
    "WebPCodec",
    "ZstdCodec",
    "check_bits",
    "check_target",
    "code_codec",
    "codec_from_dict",
    "export_bundle",
    "image_codec",
    "integer_frequencies",
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
