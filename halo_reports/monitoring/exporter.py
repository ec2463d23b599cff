"""A Prometheus endpoint for run folders, on the loopback interface only, with a bearer token.

    Authorization: Bearer <content of the token file>

Only its owner can read the token file. Prometheus is configured with the file (`credentials_file`), not the token.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, generate_latest

from halo_reports.monitoring.families import RunCollector

LOOPBACK = "127.0.0.1"
_CLIENT_TIMEOUT_SECONDS = 10.0


def default_token_file() -> Path:
    configuration = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(configuration) / "halo" / "metrics.token"


def read_or_make_token(path: Path) -> str:
    """The token in `path`, created at first use with mode 0600. ValueError if others can read it, or it is empty."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    else:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ValueError(
            f"{path} is readable by others; run `chmod 600 {path}`, or remove it to get a new token"
        )
    token = path.read_text().strip()
    if not token:
        raise ValueError(f"{path} has no token; remove it to get a new one")
    return token


def exposition(folder: Path) -> str:
    """The metrics of all runs in `folder`, in Prometheus' text format."""
    return generate_latest(_registry(folder)).decode()


def _registry(folder: Path) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunCollector(folder))
    return registry


class MetricsServer(ThreadingHTTPServer):
    """Serves the metrics of the runs in `folder` at /metrics, to clients with `token`."""

    daemon_threads = True

    def __init__(self, folder: Path, token: str, port: int) -> None:
        """Port 0 selects a free port. OSError if the port is in use."""
        self.registry = _registry(folder)
        self.token = token
        super().__init__((LOOPBACK, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/metrics"


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    timeout = _CLIENT_TIMEOUT_SECONDS

    def do_GET(self) -> None:
        given, expected = self.headers.get("Authorization", ""), f"Bearer {self.server.token}"
        if not hmac.compare_digest(given.encode(), expected.encode()):
            self._answer(HTTPStatus.UNAUTHORIZED, b"this endpoint requires a bearer token\n", "text/plain")
        elif self.path.partition("?")[0] != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, b"the only path is /metrics\n", "text/plain")
        else:
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._answer(HTTPStatus.OK, encode(self.server.registry), content_type)

    def _answer(self, status: HTTPStatus, content: bytes, content_type: str) -> None:
        self.send_response(status)
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *values: object) -> None:
        """Do not log every scrape."""
