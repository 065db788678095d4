"""The listener of ``tide-ray serve``: HTTP in the front's own process and event loop.

Ray Serve's proxy would carry every chunk of a stream through one more process. It does so where ``serve deploy`` starts
the application, as it alone listens on every node.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import dataclass
from typing import Any

import uvicorn

from tide_ray.types import UserError

KEEP_ALIVE_SECONDS = 90
"""As long as Ray Serve's proxy keeps an idle connection."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen, and the TLS files to do it with, if any."""

    host: str
    port: int
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None

    def check(self) -> None:
        """Raises UserError where somebody listens already, or where a TLS file cannot be used."""
        self._bound(socket.SO_REUSEADDR).close()
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise UserError("ssl_keyfile, ssl_certfile: one is given without the other")
        if self.ssl_certfile is None:
            if self.ssl_ca_certs is not None:
                raise UserError("ssl_ca_certs: needs ssl_keyfile and ssl_certfile")
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            try:
                if (path := getattr(self, name)) is not None:
                    open(path, "rb").close()
            except OSError as error:
                raise UserError(f"{name}: cannot read {path!r}: {error.strerror}") from None
        try:
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, lambda: self.ssl_keyfile_password or "")
        except (ssl.SSLError, ValueError) as error:
            raise UserError(f"ssl_keyfile, ssl_certfile: they are no pair that can be used: {error}") from None
        if self.ssl_ca_certs is not None:
            try:
                context.load_verify_locations(self.ssl_ca_certs)
            except ssl.SSLError as error:
                raise UserError(f"ssl_ca_certs: no certificates in {self.ssl_ca_certs!r}: {error}") from None

    def listen(self) -> socket.socket:
        """A listening socket. Those of several processes with one address share its connections.

        Raises:
            UserError: it cannot be had.
        """
        listening = self._bound(socket.SO_REUSEADDR, socket.SO_REUSEPORT)
        listening.listen(2048)
        return listening

    def _bound(self, *options: int) -> socket.socket:
        found = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET, socket.SOCK_STREAM)
        for option in options:
            found.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            found.bind((self.host, self.port))
        except OSError as error:
            found.close()
            at = f"{self.host!r}, {self.port}"
            raise UserError(f"host, port: cannot listen at {at}: {error.strerror or error}") from None
        return found


class Listener:
    """Answers at an address with an application, as a task of the running event loop for as long as that runs.

    Raises:
        UserError: the address cannot be had.
    """

    def __init__(self, app: Any, address: Address) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="critical",  # below are tracebacks, whose messages may quote a prompt; the guard logs without
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            ssl_keyfile=address.ssl_keyfile,
            ssl_certfile=address.ssl_certfile,
            ssl_keyfile_password=address.ssl_keyfile_password,
            ssl_ca_certs=address.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_REQUIRED if address.ssl_ca_certs else ssl.CERT_NONE,
        )
        serving = uvicorn.Server(config).serve(sockets=[address.listen()])
        self._task = asyncio.get_running_loop().create_task(serving)

    @property
    def is_open(self) -> bool:
        return not self._task.done()
