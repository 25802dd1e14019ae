"""What a device or a server needs: bundles, codecs, preprocessing and export. Imports nothing of the other rooms."""

from .bundle.export import Part, check_parts, check_target, export_bundle
from .bundle.files import BundleError, FileEntry
from .bundle.loading import Bundle, Partition, load_bundle
from .bundle.manifest import Manifest, read_manifest, write_manifest
from .bundle.parity import Parity, ParityError
from .bundle.specs import PartitionSpec, TensorSpec
from .bundle.torchscript import load_torchscript, save_torchscript
from .codecs.codec import CODECS, Codec, CodesCodec, FloatCodec, UniformCodec, codec_from_dict
from .codecs.entropy_codec import EntropyCodec, integer_frequencies
from .codecs.feature_codecs import CODINGS, SparseCodec, TiledImageCodec, ZstdCodec, code_codec
from .codecs.image_codecs import IMAGE_CODECS, ImageCodec, JPEGCodec, PNGCodec, WebPCodec, image_codec
from .codecs.packing import FLOAT_BITS, CodecError, check_bits, pack_bits, packed_bytes, unpack_bits, zstd_bytes
from .exits.early_exit import Exited, anytime, exit_shares, expected_cost, leave_early, offline
from .exits.policies import (
    POLICIES,
    ConfidencePolicy,
    EnsemblePolicy,
    EntropyPolicy,
    MarginPolicy,
    PatiencePolicy,
    build_policy,
    policy_from_dict,
)
from .exits.policy import Decision, ExitPolicy
from .exits.specs import ExitSpec, check_policy, read_policy
from .runtime.pipeline import Pipeline, Result
from .runtime.preprocess import ImageError, ImageInput, open_image

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
