"""What a device or a server needs: bundles, codecs, preprocessing and export. Imports nothing of the other rooms."""

from .bundle import Bundle, Partition, load_bundle
from .codec import CODECS, Codec, CodesCodec, FloatCodec, UniformCodec, codec_from_dict
from .early_exit import Exited, anytime, exit_shares, expected_cost, leave_early, offline
from .entropy_codec import EntropyCodec, integer_frequencies
from .exit_policies import (
    POLICIES,
    ConfidencePolicy,
    EnsemblePolicy,
    EntropyPolicy,
    MarginPolicy,
    PatiencePolicy,
    build_policy,
    policy_from_dict,
)
from .exit_policy import Decision, ExitPolicy
from .exits import ExitSpec, check_policy, read_policy
from .export import Part, check_parts, check_target, export_bundle
from .feature_codecs import CODINGS, SparseCodec, TiledImageCodec, ZstdCodec, code_codec
from .files import BundleError, FileEntry
from .image_codecs import IMAGE_CODECS, ImageCodec, JPEGCodec, PNGCodec, WebPCodec, image_codec
from .inference import Pipeline, Result
from .manifest import Manifest, read_manifest, write_manifest
from .packing import FLOAT_BITS, CodecError, check_bits, pack_bits, packed_bytes, unpack_bits, zstd_bytes
from .parity import Parity, ParityError
from .preprocess import ImageError, ImageInput, open_image
from .specs import PartitionSpec, TensorSpec
from .torchscript import load_torchscript, save_torchscript

__all__ = [
    "CODECS",
    "CODINGS",
    "FLOAT_BITS",
    "IMAGE_CODECS",
    "POLICIES",
    "Bundle",
    "BundleError",
    "Codec",
    "CodecError",
    "CodesCodec",
    "ConfidencePolicy",
    "Decision",
    "EnsemblePolicy",
    "EntropyCodec",
    "EntropyPolicy",
    "ExitPolicy",
    "ExitSpec",
    "Exited",
    "FileEntry",
    "FloatCodec",
    "ImageCodec",
    "ImageError",
    "ImageInput",
    "JPEGCodec",
    "Manifest",
    "MarginPolicy",
    "PNGCodec",
    "Parity",
    "ParityError",
    "Part",
    "Partition",
    "PartitionSpec",
    "PatiencePolicy",
    "Pipeline",
    "Result",
    "SparseCodec",
    "TensorSpec",
    "TiledImageCodec",
    "UniformCodec",
    "WebPCodec",
    "ZstdCodec",
    "anytime",
    "build_policy",
    "check_bits",
    "check_parts",
    "check_policy",
    "check_target",
    "code_codec",
    "codec_from_dict",
    "exit_shares",
    "expected_cost",
    "export_bundle",
    "image_codec",
    "integer_frequencies",
    "leave_early",
    "load_bundle",
    "load_torchscript",
    "offline",
    "open_image",
    "pack_bits",
    "packed_bytes",
    "policy_from_dict",
    "read_manifest",
    "read_policy",
    "save_torchscript",
    "unpack_bits",
    "write_manifest",
    "zstd_bytes",
]
