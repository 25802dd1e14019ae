"""What a device or a server needs: bundles, codecs, preprocessing and export. Imports nothing of the other rooms."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .bundle.draws import Draw
from .bundle.edges import Crossing, Edge, Transfer
from .bundle.envelope import ENVELOPE_BYTES, Envelope
from .bundle.files import BundleError, FileEntry
from .bundle.loading import Bundle, Partition, load_bundle
from .bundle.manifest import Manifest, read_manifest, write_manifest
from .bundle.parity import Parity, ParityError
from .bundle.route import Route
from .bundle.specs import OutputSpec, PartitionSpec, TensorSpec
from .bundle.torchscript import load_torchscript, save_torchscript
from .bundle.writing.export import Part, check_parts, export_bundle
from .bundle.writing.folder import check_target
from .codecs.codec import CODECS, Codec, FloatCodec, codec_from_dict
from .codecs.entropy_codec import EntropyCodec, integer_frequencies
from .codecs.feature_codecs import CODINGS, SparseCodec, ZstdCodec, code_codec
from .codecs.packing import (
    FLOAT_BITS,
    CodecError,
    PayloadError,
    check_bits,
    pack_bits,
    packed_bytes,
    unpack_bits,
    zstd_bytes,
)
from .codecs.uniform import CodesCodec, UniformCodec
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
from .exits.specs import ExitSpec, check_policy, exit_logits, read_policy
from .runtime.gathering import Result
from .runtime.inputs import Input, TensorInput
from .runtime.pipeline import Pipeline
from .runtime.preprocess import ImageError, ImageInput, open_image
from .runtime.side import Outcome, Side
from .runtime.walk import Message

if TYPE_CHECKING:
    from .runtime.asking.retrying import Breaker, Retries
    from .runtime.device import Answered, Device
    from .runtime.server import Server
    from .runtime.serving.onward import Onward
    from .runtime.serving.repository import Repository
    from .runtime.trust import Trust
    from .runtime.wire.status import ServingError

# What is imported once it is asked for: who serves nothing needs no gRPC.
_ON_DEMAND = {
    "Answered": ".runtime.device",
    "Breaker": ".runtime.asking.retrying",
    "Device": ".runtime.device",
    "Retries": ".runtime.asking.retrying",
    "Onward": ".runtime.serving.onward",
    "Repository": ".runtime.serving.repository",
    "Server": ".runtime.server",
    "ServingError": ".runtime.wire.status",
    "Trust": ".runtime.trust",
}

__all__ = [
    "CODECS",
    "CODINGS",
    "ENVELOPE_BYTES",
    "FLOAT_BITS",
    "POLICIES",
    "Answered",
    "Breaker",
    "Bundle",
    "BundleError",
    "Codec",
    "CodecError",
    "CodesCodec",
    "ConfidencePolicy",
    "Crossing",
    "Decision",
    "Device",
    "Draw",
    "Edge",
    "EnsemblePolicy",
    "EntropyCodec",
    "EntropyPolicy",
    "Envelope",
    "ExitPolicy",
    "ExitSpec",
    "Exited",
    "FileEntry",
    "FloatCodec",
    "ImageError",
    "ImageInput",
    "Input",
    "Manifest",
    "MarginPolicy",
    "Message",
    "Onward",
    "Outcome",
    "OutputSpec",
    "Parity",
    "ParityError",
    "Part",
    "Partition",
    "PartitionSpec",
    "PatiencePolicy",
    "PayloadError",
    "Pipeline",
    "Repository",
    "Result",
    "Retries",
    "Route",
    "Server",
    "ServingError",
    "Side",
    "SparseCodec",
    "TensorInput",
    "TensorSpec",
    "Transfer",
    "Trust",
    "UniformCodec",
    "ZstdCodec",
    "anytime",
    "build_policy",
    "check_bits",
    "check_parts",
    "check_policy",
    "check_target",
    "code_codec",
    "codec_from_dict",
    "exit_logits",
    "exit_shares",
    "expected_cost",
    "export_bundle",
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


def __getattr__(name: str) -> Any:
    """Import what serving needs at its first use."""
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = getattr(importlib.import_module(_ON_DEMAND[name], __name__), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("grpc", "google"):
            raise
        raise ImportError(f"{name} needs the extra `serve`: pip install grpcio protobuf ({error})") from error
    globals()[name] = found
    return found
