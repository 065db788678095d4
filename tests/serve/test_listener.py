"""The front's own listener: addresses and TLS files that cannot be used, TLS with the official client, shared ports."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ports import free_port
from serving import KEY, MODEL, Running
from tide_ray.serve.listener import Address, Listener
from tide_ray.types import UserError


class Certificates:
    """An authority of this run, and files signed by it.

    Args:
        folder: where the files go.
        name: the authority's.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.authority = self._write(f"{name}.pem", self._sign(self._name, self._key.public_key(), is_authority=True))

    def make(self, name: str, password: str | None = None) -> tuple[str, str]:
        """Key file and certificate file for 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        hidden = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
        written = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
        certificate = self._write(f"{name}.crt", self._sign(subject, key.public_key(), is_authority=False))
        path = self._folder / f"{name}.key"
        path.write_bytes(written)
        return str(path), certificate

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, is_authority: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _write(self, name: str, certificate: x509.Certificate) -> str:
        path = self._folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return str(path)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"), "authority")


@contextmanager
def listening(app: Any, *addresses: Address) -> Iterator[list[Listener]]:
    """Listeners in an event loop of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> list[Listener]:
        return [Listener(app, address) for address in addresses]

    async def end() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        yield asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def test_the_official_client_streams_over_tls(live: Running, certificates: Certificates) -> None:
    key, certificate = certificates.make("server", password="hush")
    address = Address("127.0.0.1", free_port(), key, certificate, "hush")
    address.check()
    with listening(live.server.app, address) as [listener]:
        url = f"https://127.0.0.1:{address.port}/v1"
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=certificates.authority))
        with openai.OpenAI(base_url=url, api_key=KEY, http_client=trusting, max_retries=0) as client:
            chunks = client.completions.create(
                model=MODEL, prompt="x", max_tokens=9, stream=True, extra_body={"ignore_eos": True}
            )
            assert sum(len(chunk.choices[0].tide["exit_layers"]) for chunk in chunks) == 9
        with (
            openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client,
            pytest.raises(openai.APIConnectionError),
        ):
            client.models.list()  # it does not know who signed
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{address.port}/health")
        assert listener.is_open


def test_clients_must_be_signed_by_the_authority_that_is_asked_for(
    live: Running, certificates: Certificates, tmp_path: Path
) -> None:
    key, certificate = certificates.make("strict")
    address = Address("127.0.0.1", free_port(), key, certificate, ssl_ca_certs=certificates.authority)
    address.check()
    stranger = Certificates(tmp_path, "stranger")
    with listening(live.server.app, address):
        for signer, is_let_in in ((certificates, True), (stranger, False), (None, False)):
            context = ssl.create_default_context(cafile=certificates.authority)
            if signer is not None:
                own_key, own_certificate = signer.make("client")
                context.load_cert_chain(own_certificate, own_key)
            with httpx.Client(verify=context) as client:
                if is_let_in:
                    assert client.get(f"https://127.0.0.1:{address.port}/health").status_code == 200
                else:
                    with pytest.raises(httpx.HTTPError):
                        client.get(f"https://127.0.0.1:{address.port}/health")


def test_listeners_with_one_address_share_its_connections() -> None:
    port, seen = free_port(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})
        seen.append(scope["server"][1])

    with listening(app, Address("127.0.0.1", port), Address("127.0.0.1", port)):
        for _ in range(20):
            assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
        with pytest.raises(UserError, match=r"host, port: cannot listen at '127\.0\.0\.1', "):
            Address("127.0.0.1", port).check()  # somebody listens
    assert seen == [port] * 20


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"ssl_keyfile": "KEY"}, "ssl_keyfile, ssl_certfile: one is given without the other"),
        ({"ssl_ca_certs": "CA"}, "ssl_ca_certs: needs ssl_keyfile and ssl_certfile"),
        ({"ssl_keyfile": "/none.key", "ssl_certfile": "CERT"}, "ssl_keyfile: cannot read '/none.key': No such file"),
        ({"ssl_keyfile": "OTHER", "ssl_certfile": "CERT"}, "ssl_keyfile, ssl_certfile: they are no pair"),
        ({"ssl_keyfile": "LOCKED", "ssl_certfile": "LOCKED_CERT"}, "ssl_keyfile, ssl_certfile: they are no pair"),
        ({"ssl_keyfile": "KEY", "ssl_certfile": "CERT", "ssl_ca_certs": "KEY"}, "ssl_ca_certs: no certificates in "),
    ],
)
def test_tls_files_that_cannot_be_used_are_named_at_once(
    given: dict[str, str], told: str, certificates: Certificates
) -> None:
    files: dict[str, str] = {"CA": certificates.authority}
    files["KEY"], files["CERT"] = certificates.make("good")
    files["OTHER"], _ = certificates.make("other")
    files["LOCKED"], files["LOCKED_CERT"] = certificates.make("locked", password="forgotten")
    values = {name: files.get(value, value) for name, value in given.items()}
    with pytest.raises(UserError) as caught:
        Address("127.0.0.1", free_port(), **values).check()
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(UserError, match=r"host, port: cannot listen at '192\.0\.2\.1', 8000: "):
        Address("192.0.2.1", 8000).check()
    with pytest.raises(UserError, match=r"host, port: cannot listen at 'no\.such\.host\.invalid', 8000: "):
        Address("no.such.host.invalid", 8000).check()
