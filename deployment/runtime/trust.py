"""Who may reach a server, and how a client knows that it has reached the right one."""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import re
import ssl
import time
from pathlib import Path
from typing import Any

_MOST_TOKEN_BYTES = 4096
_MOST_PEM_BYTES = 2**20
_REFUSED = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([^:]*)")
_OTHER_HOST = re.compile(r"(?i)hostname verification|peer name \S+ is not in peer certificate")


@dataclasses.dataclass(frozen=True)
class Trust:
    """Certificates and the token of one end of a connection.

    Args:
        certificate: This end's certificate chain, a PEM file. A client needs one where the server asks for it.
        key: Its private key, a PEM file; both or neither.
        authorities: Whose certificates the other end may have, a PEM file. A server with these asks every client for
            one (mutual TLS); a client with these, or with a certificate, speaks TLS.
        token: A file whose content clients send, and servers compare in constant time.
        insecure: Whether to do without TLS where others can listen, or read a token.

    Raises:
        ValueError: A file is missing or unusable, or only one of certificate and key is given.
    """

    certificate: str | Path | None = None
    key: str | Path | None = None
    authorities: str | Path | None = None
    token: str | Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            given, missing = ("certificate", "key") if self.key is None else ("key", "certificate")
            raise ValueError(f"{given}={getattr(self, given)} is given without a {missing}; TLS needs both")
        for name in ("certificate", "key", "authorities", "token"):
            _read(name, getattr(self, name))
        if self.certificate is not None:
            check_certificate(self.certificate, self.key)
        if self.authorities is not None:
            check_authorities(self.authorities)

    @property
    def encrypts(self) -> bool:
        """Whether this end speaks TLS."""
        return self.certificate is not None or self.authorities is not None

    def check_host(self, host: str) -> None:
        """Raise :class:`ValueError` where a server would be heard by others without TLS."""
        if self.authorities is not None and self.certificate is None:
            raise ValueError(f"authorities={self.authorities} need a certificate and key of the server's own")
        if self.certificate is None and not self.insecure and not is_loopback(host):
            raise ValueError(
                f"{host or 'every address'} can be reached from other machines, but there is no certificate; give "
                "certificate=FILE key=FILE, listen on 127.0.0.1, or set insecure=true where the network is trusted"
            )

    def check_target(self, host: str) -> None:
        """Raise :class:`ValueError` where a client would send its token so that others can read it."""
        if self.token is not None and not self.encrypts and not self.insecure and not is_loopback(host):
            raise ValueError(
                f"token={self.token} would go to {host} in the clear, where others can read it; give authorities=FILE, "
                "so that the connection is encrypted, or set insecure=true where the network is trusted"
            )

    def server_credentials(self) -> Any:
        """Return what gRPC's server takes, or ``None`` without TLS."""
        if self.certificate is None:
            return None
        import grpc

        pair = (_read("key", self.key), _read("certificate", self.certificate))
        roots = _read("authorities", self.authorities)
        return grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)

    def channel_credentials(self) -> Any:
        """Return what gRPC's client takes, or ``None`` without TLS."""
        if not self.encrypts:
            return None
        import grpc

        pair = _read("key", self.key), _read("certificate", self.certificate)
        return grpc.ssl_channel_credentials(_read("authorities", self.authorities), *pair)

    def secret(self) -> str | None:
        """Return the token; :class:`ValueError` where it cannot be sent."""
        content = _read("token", self.token)
        if content is None:
            return None
        try:
            text = content.decode("ascii").strip()
        except UnicodeDecodeError:
            text = ""
        if not 16 <= len(text) <= _MOST_TOKEN_BYTES or not text.isprintable() or " " in text:
            raise ValueError(
                f"token={self.token} must hold one word of 16 to {_MOST_TOKEN_BYTES} ASCII characters; "
                "`openssl rand -hex 32` prints one"
            )
        return text


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, as nobody else sees it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def allowed(metadata: Any, secret: str) -> bool:
    """Whether a request's metadata hold the token; takes as long for any wrong one."""
    given = [value for key, value in metadata or () if key == "authorization"]
    text = given[0] if len(given) == 1 and isinstance(given[0], str) else ""
    return hmac.compare_digest(text.encode(), f"Bearer {secret}".encode())


def explained(code: str, words: str) -> tuple[str, str]:
    """Return the status and words of a failed call, plainly where two ends do not trust each other.

    gRPC gives that the status of a server that is away, UNAVAILABLE, but no other try would help.
    """
    if code != "UNAVAILABLE":
        return code, words
    if found := _REFUSED.search(words):
        expired = "expired" in found[1]
        way = "the server needs a new one" if expired else "name those who vouch for it by authorities=FILE"
        return "UNAUTHENTICATED", f"its certificate is refused: {found[1].strip()}; {way}"
    if _OTHER_HOST.search(words):
        return "UNAUTHENTICATED", "its certificate is of another host; call it by the name that its certificate has"
    if "WRONG_VERSION_NUMBER" in words:
        return (
            "UNAUTHENTICATED",
            "it speaks no TLS; serve with certificate=FILE key=FILE, or call it without authorities",
        )
    if "failed to connect" in words and "Socket closed" in words:
        # Also what a server that stops does, so it stays UNAVAILABLE.
        return code, f"{words}; it may ask for TLS (authorities=FILE), or for a certificate of this side"
    return code, words


def check_certificate(certificate: str | Path, key: str | Path | None) -> None:
    """Raise :class:`ValueError` unless a certificate and its key belong together and are valid today.

    It is shown to this very process, over a connection in memory, which trusts it.
    """
    try:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(certificate, key, password="")
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        client.load_verify_locations(certificate)
        _shake(server, client)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in (9, 10):  # not yet, or no longer, valid
            raise ValueError(f"certificate={certificate}: {error.verify_message}; make a new one") from error
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"certificate={certificate} and key={key} cannot be used together: {error}") from error


def check_authorities(file: str | Path) -> None:
    """Raise :class:`ValueError` unless a file has certificates, one of which at least is valid today."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(file)
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"authorities={file} has no certificates in PEM that can be read: {error}") from error
    ends = [ssl.cert_time_to_seconds(str(each["notAfter"])) for each in context.get_ca_certs()]
    # Where all are of authorities, that is all that there is.
    if ends and len(ends) == context.cert_store_stats()["x509"] and max(ends) < time.time():
        raise ValueError(f"authorities={file}: certificate has expired; get a new one of the other end")


def _shake(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(8):
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue


def _read(name: str, file: str | Path | None) -> bytes | None:
    if file is None:
        return None
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{name}={file} is no file")
    with path.open("rb") as opened:
        content = opened.read(_MOST_PEM_BYTES + 1)
    if len(content) > _MOST_PEM_BYTES:
        raise ValueError(f"{name}={file} has more than {_MOST_PEM_BYTES} bytes: it is another file")
    return content
