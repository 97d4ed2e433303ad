"""TLS: clients that do not shake hands, and certificates that are read again."""

from __future__ import annotations

import contextlib
import logging
import shutil
import ssl
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import listening
from .live import PATIENCE, Live, until_closed

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="no openssl to make certificates with"
)


def certificate(folder: Path, name: str) -> None:
    """Write cert.pem and key.pem for this name."""
    files = ("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"))
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1")
    subprocess.run(
        ["openssl", "req", "-x509", *kind, "-subj", f"/CN={name}", *files], check=True, capture_output=True
    )


def files(folder: Path) -> dict[str, str]:
    certificate(folder, "first")
    return {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}


def shown(server: Live) -> bytes:
    """The certificate that a new connection sees."""
    return ssl.get_server_certificate(("127.0.0.1", server.port), timeout=PATIENCE).encode()


def test_who_does_not_shake_hands_is_closed(tmp_path: Path) -> None:
    with listening(**files(tmp_path), timeout_headers=0.2) as server, server.connect() as silent:
        assert until_closed(silent) == b""
        assert b"BEGIN CERTIFICATE" in shown(server)


def test_who_does_not_shake_hands_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn sees a TLS client after the handshake only."""
    monkeypatch.setattr("penstock.http.limits._HEARING", 0.0)
    options = {"max_connections": 2, "timeout_headers": PATIENCE, "timeout_keep_alive": 1000}
    with listening(**files(tmp_path), **options) as server:
        silent = [server.connect() for _ in range(4)]
        assert [until_closed(each) for each in silent[:2]] == [b"", b""]
        assert b"BEGIN CERTIFICATE" in shown(server)
        for each in silent:
            each.close()


def test_no_tls_at_all(tmp_path: Path) -> None:
    with listening(**files(tmp_path)) as server:
        with server.connect() as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"HTTP/1.1 200" not in until_closed(plain)
        assert b"BEGIN CERTIFICATE" in shown(server)


def test_a_refusal_over_tls(tmp_path: Path) -> None:
    with listening(**files(tmp_path), max_header_bytes=4096) as server:
        context = ssl._create_unverified_context()
        with context.wrap_socket(server.connect()) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 50_000)
            received = connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 431 ")


def test_certificates_are_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with listening(**files(tmp_path)) as server, caplog.at_level(logging.INFO):
        first = shown(server)
        with ssl._create_unverified_context().wrap_socket(server.connect()) as old:
            certificate(tmp_path, "second")
            assert shown(server) == first
            server.reload()
            second = shown(server)
            assert second != first
            old.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert old.recv(65536).startswith(b"HTTP/1.1 200 ")
        (tmp_path / "key.pem").write_text("no key")
        server.reload()
        assert shown(server) == second
        assert "stay as they were" in caplog.text


def renewed(folder: Path, version: str) -> None:
    """What Kubernetes does with a secret: a folder of the new files, and the link to it is swapped."""
    (folder / version).mkdir()
    certificate(folder / version, version)
    (folder / "new").symlink_to(version)
    (folder / "new").replace(folder / "..data")


def linked(folder: Path) -> dict[str, str]:
    renewed(folder, "first")
    for name in ("cert.pem", "key.pem"):
        (folder / name).symlink_to(Path("..data", name))
    return {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}


def test_certificates_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.http.serve._LOOK", 1)
    with listening(**linked(tmp_path), enable_ssl_refresh=True) as server:
        first = shown(server)
        with ssl._create_unverified_context().wrap_socket(server.connect()) as old:
            renewed(tmp_path, "second")
            end = time.monotonic() + PATIENCE
            while shown(server) == first:
                assert time.monotonic() < end
            assert shown(server).strip() == (tmp_path / "second" / "cert.pem").read_bytes().strip()
            old.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert old.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_certificates_are_not_watched_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    monkeypatch.setattr("penstock.http.serve._LOOK", 1)
    monkeypatch.setattr("penstock.http.tls.Certificates.look", looks.append)
    with listening(**files(tmp_path)) as server:
        shown(server)
    assert not looks


def test_half_a_renewal_changes_nothing_and_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "next").mkdir()
    certificate(tmp_path / "next", "second")
    with listening(**files(tmp_path)) as server, caplog.at_level(logging.INFO):
        first = shown(server)
        shutil.copy(tmp_path / "next" / "cert.pem", tmp_path / "cert.pem")  # the key is the old one's
        for _ in range(3):
            server.look()
        assert shown(server) == first
        (tmp_path / "key.pem").unlink()
        for _ in range(3):
            server.look()
        assert shown(server) == first
        assert caplog.text.count("They have changed: the TLS files stay as they were.") == 2
        shutil.copy(tmp_path / "next" / "key.pem", tmp_path / "key.pem")
        for _ in range(3):
            server.look()
        assert shown(server).strip() == (tmp_path / "next" / "cert.pem").read_bytes().strip()
        assert caplog.text.count("new connections get the certificate") == 1


def test_client_certificates_are_asked_for_after_a_renewal(tmp_path: Path) -> None:
    options = {**files(tmp_path), "ssl_ca_certs": str(tmp_path / "cert.pem"), "ssl_cert_reqs": 2}

    def heard(context: ssl.SSLContext) -> bytes:
        with contextlib.suppress(OSError), context.wrap_socket(server.connect()) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            return connection.recv(65536)  # with TLS 1.3, a client hears of its refusal after the handshake
        return b""

    stranger, known = ssl._create_unverified_context(), ssl._create_unverified_context()
    known.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with listening(**options) as server:
        for _ in range(2):
            assert heard(stranger) == b""
            assert heard(known).startswith(b"HTTP/1.1 200 ")
            server.reload()


def test_no_certificate_to_read_again(server: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        server.reload()
        assert server.get("/health").status == 200
    assert "nothing to read again" in caplog.text
