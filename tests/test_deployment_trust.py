"""Who may reach a server: TLS on one side or both, a token, and nobody from elsewhere without them."""

from __future__ import annotations

import re
import shutil
import subprocess

import grpc
import pytest

from cleave.deployment import Device, Onward, Retries, Server, ServingError, Trust, load_bundle
from cleave.deployment.runtime.serving.repository import Repository
from cleave.deployment.runtime.trust import allowed, is_loopback

from .deployment_networks import exit_bundle, exit_images, images, make_bundle
from .serving_client import Caller, request_of, serving

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
TOKEN = "0123456789abcdef0123456789abcdef"


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """An authority, and certificates by it: of this host, of another, of a client, and one that has expired."""
    folder = tmp_path_factory.mktemp("keys")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl(
        "req", "-x509", *curve, "-keyout", folder / "ca.key", "-out", folder / "ca.pem", "-subj", "/CN=ca", "-days", 2
    )
    for name, host in (("server", "localhost"), ("other", "elsewhere.example"), ("client", "client")):
        openssl("req", *curve, "-keyout", folder / f"{name}.key", "-out", folder / "r.csr", "-subj", f"/CN={host}")
        (folder / "ext").write_text(f"subjectAltName=DNS:{host}\n")
        by = ["-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-CAcreateserial", "-extfile", folder / "ext"]
        openssl("x509", "-req", "-in", folder / "r.csr", *by, "-days", 2, "-out", folder / f"{name}.pem")
    openssl("x509", "-req", "-in", folder / "r.csr", *by, "-days", -1, "-out", folder / "expired.pem")
    shutil.copy(folder / "client.key", folder / "expired.key")
    old = ["-in", folder / "r.csr", "-signkey", folder / "client.key", "-extfile", folder / "ca.ext"]
    (folder / "ca.ext").write_text("basicConstraints=critical,CA:TRUE\n")
    openssl("x509", "-req", *old, "-days", -1, "-out", folder / "old.pem")
    (folder / "token").write_text(TOKEN + "\n")
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "net"
    make_bundle(folder, "whole")
    return folder


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    folder = tmp_path_factory.mktemp("early") / "early"
    exit_bundle(folder, placements=("device", "server", "server"), split="layer1")
    return folder


def trust(keys, name, **more):
    return Trust(keys / f"{name}.pem", keys / f"{name}.key", **more)


def code_of(caller):
    try:
        return caller("ServerLive", timeout=20).live
    except grpc.RpcError as error:
        return error.code().name


def secure(server, client):
    return Caller(server.port, credentials=client.channel_credentials(), host="localhost")


def test_tls_lets_those_through_who_know_the_authority(keys, bundle):
    with serving(bundle, trust=trust(keys, "server")) as (server, plain):
        assert code_of(plain) == "UNAVAILABLE"
        assert code_of(secure(server, Trust(authorities=keys / "ca.pem"))) is True
        assert code_of(secure(server, Trust(authorities=keys / "other.pem"))) == "UNAVAILABLE"


def test_a_certificate_of_another_host_is_refused(keys, bundle):
    with serving(bundle, trust=trust(keys, "other")) as (server, _):
        caller = secure(server, Trust(authorities=keys / "ca.pem"))
        with pytest.raises(grpc.RpcError, match="(?i)peer name localhost is not in peer certificate|hostname"):
            caller("ServerLive", timeout=20)


def test_mutual_tls_asks_clients_too(keys, bundle):
    asking = trust(keys, "server", authorities=keys / "ca.pem")
    with serving(bundle, trust=asking) as (server, _):
        assert code_of(secure(server, Trust(authorities=keys / "ca.pem"))) == "UNAVAILABLE"
        assert code_of(secure(server, trust(keys, "client", authorities=keys / "ca.pem"))) is True


class Unchecked(Trust):
    """Certificates that were good when a server began."""

    def __post_init__(self):
        return


@pytest.mark.parametrize(
    ("served", "asking", "words"),
    [
        ("expired", "ca", "its certificate is refused: certificate has expired; the server needs a new one"),
        ("other", "ca", "its certificate is of another host; call it by the name"),
        ("server", "other", "its certificate is refused: unable to get local issuer.*; name those who vouch"),
        (None, "ca", "it speaks no TLS; serve with certificate=FILE"),
    ],
)
def test_a_device_says_whom_it_does_not_trust_and_asks_no_more(served, asking, words, keys, early):
    own = Trust() if served is None else Unchecked(keys / f"{served}.pem", keys / f"{served}.key")
    by = Trust(authorities=keys / f"{asking}.pem")
    with serving(early, trust=own) as (server, _):
        error = refused(early, f"localhost:{server.port}", by, f"localhost:{server.port}: {words}")
    assert (error.code, error.attempts) == ("UNAUTHENTICATED", 1)


def test_a_device_without_what_the_server_asks_for_is_told_so(keys, early):
    (keys / "wrong").write_text(TOKEN[::-1])
    with serving(early, trust=Trust(token=keys / "token")) as (server, _):
        for own in (None, Trust(token=keys / "wrong")):
            error = refused(early, f"127.0.0.1:{server.port}", own, "the token is missing or wrong")
            assert (error.code, error.attempts) == ("UNAUTHENTICATED", 1)
    words = "it may ask for TLS .* or for a certificate of this side"
    with serving(early, trust=trust(keys, "server", authorities=keys / "ca.pem")) as (server, _):
        assert refused(early, f"127.0.0.1:{server.port}", None, words, "error").code == "UNAVAILABLE"


def refused(folder, address, trust_, words, fallback="exit"):
    """What a device says of a server that it asks; a fallback hides nothing where the server is there."""
    retries = Retries(timeout=20, attempts=2)
    with Device(load_bundle(folder), address, trust=trust_, retries=retries, fallback=fallback) as device:
        with pytest.raises(ServingError, match=words) as error:
            device.run(exit_images(4))
        return error.value


def test_every_method_asks_for_the_token(keys, bundle):
    with serving(bundle, trust=Trust(token=keys / "token")) as (server, without):
        assert code_of(without) == "UNAUTHENTICATED"
        assert without.status(request_of("net.all", {"images": images(1)}))[0] == "UNAUTHENTICATED"
        with pytest.raises(grpc.RpcError, match="the token is missing or wrong"):
            next(without.stub("ModelStreamInfer")(iter([request_of("net.all", {})]), timeout=20))
        with pytest.raises(grpc.RpcError, match="the token is missing or wrong"):
            without("RepositoryModelUnload", model_name="net")
        assert code_of(Caller(server.port, token=TOKEN[:-1])) == "UNAUTHENTICATED"
        assert code_of(Caller(server.port, token=TOKEN)) is True
        assert Caller(server.port, token=TOKEN).status(request_of("net.all", {"images": images(1)})) == ("OK", "")
        assert server.metrics.counts() == {"UNAUTHENTICATED": 5, "OK": 1}


def test_a_token_goes_to_other_machines_in_the_clear_only_where_that_is_wanted(keys, early):
    bundle, secret = load_bundle(early), {"token": keys / "token"}
    for host in ("192.0.2.1", "example.org", "[2001:db8::1]"):
        with pytest.raises(ValueError, match=f"would go to {re.escape(host.strip('[]'))} in the clear"):
            Device(bundle, f"{host}:8001", trust=Trust(**secret))
        with pytest.raises(ValueError, match="in the clear.*give authorities=FILE"):
            Onward({"server": f"{host}:8001"}, Trust(**secret))
        for trusted in (Trust(**secret, insecure=True), Trust(**secret, authorities=keys / "ca.pem")):
            Device(bundle, f"{host}:8001", trust=trusted).close()
    Device(bundle, "127.0.0.1:8001", trust=Trust(**secret)).close()


def test_only_one_right_header_is_let_in():
    right = ("authorization", f"Bearer {TOKEN}")
    assert allowed([right], TOKEN)
    for wrong in (
        None,
        [],
        [right, right],
        [("authorization", TOKEN)],
        [("authorization", b"\xff")],
        [("x", right[1])],
    ):
        assert not allowed(wrong, TOKEN)


def test_others_hear_nothing_without_tls_unless_that_is_wanted(keys, bundle):
    repository = Repository()
    repository.add(bundle)
    with pytest.raises(ValueError, match="host must be a host's name or address"):
        Server(repository, host="", port=0)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ValueError, match=f"{host}.* can be reached from other machines.*insecure=true"):
            Server(repository, host=host, port=0)
        Trust(insecure=True).check_host(host)
        trust(keys, "server").check_host(host)
    with serving(bundle, host="0.0.0.0", trust=Trust(insecure=True)) as (_, caller):
        assert code_of(caller) is True
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"))


def test_keys_that_cannot_be_used_are_named_before_anybody_connects(keys, tmp_path):
    for given, words in (
        ({"certificate": keys / "server.pem"}, "certificate=.* is given without a key"),
        ({"key": keys / "server.key"}, "key=.* is given without a certificate"),
        ({"certificate": keys / "server.pem", "key": keys / "client.key"}, "cannot be used together"),
        ({"certificate": keys / "token", "key": keys / "server.key"}, "cannot be used together"),
        ({"certificate": keys / "expired.pem", "key": keys / "expired.key"}, "certificate has expired; make a new one"),
        ({"authorities": tmp_path / "nowhere"}, "authorities=.* is no file"),
        ({"authorities": keys / "token"}, "authorities=.* has no certificates in PEM"),
        ({"authorities": keys / "old.pem"}, "authorities=.*: certificate has expired"),
    ):
        with pytest.raises(ValueError, match=words):
            Trust(**given)
    with pytest.raises(ValueError, match="need a certificate and key of the server's own"):
        Trust(authorities=keys / "ca.pem").check_host("127.0.0.1")
    for content in ("short", "two words of many characters", "é" * 20, ""):
        (tmp_path / "token").write_text(content)
        with pytest.raises(ValueError, match="must hold one word of 16 to 4096 ASCII characters"):
            Trust(token=tmp_path / "token").secret()
