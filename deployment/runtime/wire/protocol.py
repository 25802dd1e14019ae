"""The Open Inference Protocol, version 2, over gRPC: its messages and methods, in a pool of descriptors of their own.

tritonclient and KServe each register a package ``inference`` in protobuf's default pool, where a second one ends the
process; nothing here touches that pool, so all three run in one process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE, FILE = "inference", "cleave/open_inference.proto"
# What gRPC lets through by itself; no limit is set below it.
USUAL_MESSAGE_BYTES = 4 * 2**20
SERVICE = f"{PACKAGE}.GRPCInferenceService"

# A line is a message, and what is in it: `name:type=number`, `*` before a type for a list, `{type}` for a map of text
# to that type, `|` in front of a field that is one of several.
_MESSAGES = """
ServerLiveRequest
ServerLiveResponse live:bool=1
ServerReadyRequest
ServerReadyResponse ready:bool=1
ModelReadyRequest name:string=1 version:string=2
ModelReadyResponse ready:bool=1
ServerMetadataRequest
ServerMetadataResponse name:string=1 version:string=2 extensions:*string=3
ModelMetadataRequest name:string=1 version:string=2
TensorMetadata name:string=1 datatype:string=2 shape:*int64=3
ModelMetadataResponse name:string=1 versions:*string=2 platform:string=3 inputs:*TensorMetadata=4
  outputs:*TensorMetadata=5 properties:{string}=6
InferParameter |bool_param:bool=1 |int64_param:int64=2 |string_param:string=3 |double_param:double=4
  |uint64_param:uint64=5
InferTensorContents bool_contents:*bool=1 int_contents:*int32=2 int64_contents:*int64=3 uint_contents:*uint32=4
  uint64_contents:*uint64=5 fp32_contents:*float=6 fp64_contents:*double=7 bytes_contents:*bytes=8
InferInputTensor name:string=1 datatype:string=2 shape:*int64=3 parameters:{InferParameter}=4
  contents:InferTensorContents=5
InferRequestedOutputTensor name:string=1 parameters:{InferParameter}=2
ModelInferRequest model_name:string=1 model_version:string=2 id:string=3 parameters:{InferParameter}=4
  inputs:*InferInputTensor=5 outputs:*InferRequestedOutputTensor=6 raw_input_contents:*bytes=7
InferOutputTensor name:string=1 datatype:string=2 shape:*int64=3 parameters:{InferParameter}=4
  contents:InferTensorContents=5
ModelInferResponse model_name:string=1 model_version:string=2 id:string=3 parameters:{InferParameter}=4
  outputs:*InferOutputTensor=5 raw_output_contents:*bytes=6
ModelStreamInferResponse error_message:string=1 infer_response:ModelInferResponse=2
ModelRepositoryParameter |bool_param:bool=1 |int64_param:int64=2 |string_param:string=3 |bytes_param:bytes=4
RepositoryIndexRequest repository_name:string=1 ready:bool=2
ModelIndex name:string=1 version:string=2 state:string=3 reason:string=4
RepositoryIndexResponse models:*ModelIndex=1
RepositoryModelLoadRequest repository_name:string=1 model_name:string=2 parameters:{ModelRepositoryParameter}=3
RepositoryModelLoadResponse
RepositoryModelUnloadRequest repository_name:string=1 model_name:string=2 parameters:{ModelRepositoryParameter}=3
RepositoryModelUnloadResponse
"""

# Methods whose messages are named for them; a stream takes what ModelInfer takes.
UNARY = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)
STREAM = "ModelStreamInfer"

# Fields of a request that are looked at one by one; more are for protobuf.
_MOST_FIELDS = 256

_Field = descriptor_pb2.FieldDescriptorProto
_FIELD = re.compile(r"(\|?)(\w+):(\*?)(\{?)(\w+)\}?=(\d+)")
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "bytes": _Field.TYPE_BYTES,
    "double": _Field.TYPE_DOUBLE,
    "float": _Field.TYPE_FLOAT,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
}


class Method(NamedTuple):
    """One method of the service.

    Attributes:
        name: Its name.
        request: The class of what it takes.
        response: The class of what it answers.
        streams: Whether it takes and answers any number of them.
    """

    name: str
    request: type[Any]
    response: type[Any]
    streams: bool = False

    @property
    def path(self) -> str:
        """Where a client finds it."""
        return f"/{SERVICE}/{self.name}"

    @property
    def reads(self) -> Callable[[bytes], Any]:
        """What a server reads its requests by."""
        return read if self.request is message("ModelInferRequest") else self.request.FromString


def described() -> descriptor_pb2.FileDescriptorProto:
    """Return the protocol as protobuf describes a file."""
    file = descriptor_pb2.FileDescriptorProto(name=FILE, package=PACKAGE, syntax="proto3")
    for line in _MESSAGES.strip().replace("\n  ", " ").splitlines():
        name, *fields = line.split()
        message = file.message_type.add(name=name)
        for field in fields:
            _add_field(message, field)
    service = file.service.add(name=SERVICE.rpartition(".")[2])
    for name in UNARY:
        service.method.add(name=name, input_type=f".{PACKAGE}.{name}Request", output_type=f".{PACKAGE}.{name}Response")
    service.method.add(
        name=STREAM,
        input_type=f".{PACKAGE}.ModelInferRequest",
        output_type=f".{PACKAGE}.ModelStreamInferResponse",
        client_streaming=True,
        server_streaming=True,
    )
    return file


def _add_field(message: descriptor_pb2.DescriptorProto, text: str) -> None:
    found = _FIELD.fullmatch(text)
    if found is None:
        raise ValueError(f"{text} is no field")
    choice, name, many, mapped, kind, number = found.groups()
    field = message.field.add(name=name, number=int(number))
    field.label = _Field.LABEL_REPEATED if many or mapped else _Field.LABEL_OPTIONAL
    if choice:
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    if not mapped:
        _set_type(field, kind)
        return
    entry = message.nested_type.add(name=f"{name.title()}Entry")
    entry.options.map_entry = True
    for number_, (part, kind_) in enumerate((("key", "string"), ("value", kind)), 1):
        _set_type(entry.field.add(name=part, number=number_, label=_Field.LABEL_OPTIONAL), kind_)
    field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{message.name}.{entry.name}"


def _set_type(field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"


POOL = descriptor_pool.DescriptorPool()
POOL.AddSerializedFile(described().SerializeToString())
_CLASSES = message_factory.GetMessageClassesForFiles([FILE], POOL)


def message(name: str) -> type[Any]:
    """Return the class of a message, such as ``ModelInferRequest``."""
    return _CLASSES[f"{PACKAGE}.{name}"]


METHODS = {
    **{name: Method(name, message(f"{name}Request"), message(f"{name}Response")) for name in UNARY},
    STREAM: Method(STREAM, message("ModelInferRequest"), message("ModelStreamInferResponse"), streams=True),
}


_RAW_INPUT = message("ModelInferRequest").DESCRIPTOR.fields_by_name["raw_input_contents"].number << 3 | 2


def written(request: Any, contents: Sequence[Sequence[bytes]]) -> bytes:
    """Return a ``ModelInferRequest`` as it goes over the wire, with the raw contents of its inputs behind it.

    Each byte of them is copied once. A message copies what is added to it, and copies it again when it is written.

    Args:
        request: The request, which has no raw contents itself.
        contents: For each input its raw content, in any number of parts.
    """
    parts = [request.SerializeToString()]
    for content in contents:
        parts += [_varint(_RAW_INPUT), _varint(sum(map(len, content))), *content]
    return b"".join(parts)


class Request:
    """A ``ModelInferRequest`` as it came, whose raw contents are views of that.

    Args:
        message: All of it but its raw contents.
        raw_input_contents: The raw contents of its inputs.
    """

    __slots__ = ("message", "raw_input_contents")

    def __init__(self, message: Any, raw_input_contents: Sequence[memoryview]) -> None:
        self.message, self.raw_input_contents = message, raw_input_contents

    def __getattr__(self, name: str) -> Any:
        return getattr(self.message, name)


def read(content: bytes) -> Any:
    """Return a ``ModelInferRequest`` that came over the wire, as a :class:`Request` where that spares copies.

    A message copies its raw contents when it is read, and each time that they are looked at. What is not plainly such
    a request is left to protobuf, to read or to refuse.

    Raises:
        google.protobuf.message.DecodeError: It is none.
    """
    whole = message("ModelInferRequest").FromString
    view, rest, raws = memoryview(content), [], []
    start = at = 0
    for _ in range(_MOST_FIELDS):
        if at == len(content):
            break
        begin, end = _field(content, at)
        if not end:
            return whole(content)
        if content[at] == _RAW_INPUT:
            rest.append(view[start:at])
            raws.append(view[begin:end])
            start = end
        at = end
    if at < len(content) or not raws:
        return whole(content)
    return Request(whole(b"".join([*rest, view[start:]])), raws)


def _field(content: bytes, at: int) -> tuple[int, int]:
    """Return where the content of the field at a place begins and ends; (0, 0) where it is none with a length."""
    if content[at] & 0x87 != 2:
        return 0, 0
    length = 0
    for place, byte in enumerate(content[at + 1 : at + 6]):
        length |= (byte & 127) << 7 * place
        if byte < 128:
            begin = at + place + 2
            return (begin, begin + length) if length <= len(content) - begin else (0, 0)
    return 0, 0


def _varint(number: int) -> bytes:
    """Return a whole number as protobuf writes it: seven bits a byte, the lowest first."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


def parameter(value: Any) -> Any:
    """Return what a parameter of a request holds: text, a whole or real number, or a truth value; ``None``: nothing."""
    choice = value.WhichOneof("parameter_choice")
    return None if choice is None else getattr(value, choice)


def set_parameters(into: Any, values: dict[str, str | int | float | bool]) -> None:
    """Write parameters into a message's map."""
    for name, value in values.items():
        kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
        setattr(into[name], kinds[type(value)], value)
