"""The certificate that new connections see, and its renewal.

    files ─▶ context ─▶ handshakes          another context when the files change, or at SIGHUP
               └─ files that do not fit together change nothing, and are told of once

A renewal writes two files, or swaps the link to their folder (Kubernetes, cert-manager, certbot): whoever
looks in between sees halves. So a context is made as a whole or not at all, and what failed is looked at
again as soon as a file changes. Connections keep the context that they began with.
"""

from __future__ import annotations

import logging
import os
import ssl

from penstock.core.errors import StartupError

from .config import HttpConfig

logger = logging.getLogger("penstock.http")

_Print = tuple[tuple[int, ...] | None, ...]
"""Of each file: which one it is, its size and its times; None for one that is not there."""


class Certificates:
    """The files of a configuration, as a context for new connections."""

    def __init__(self, config: HttpConfig) -> None:
        """Raises StartupError where the files cannot be used."""
        self._config = config
        self._seen = self._print()
        self.context = make_context(config)

    def look(self) -> None:
        """Read the files again if one of them is another than at the last look."""
        if self._print() != self._seen:
            self.reload("They have changed")

    def reload(self, why: str) -> None:
        """Read the files again, for new connections; those that cannot be used change nothing."""
        self._seen = self._print()  # what is written while they are read is seen at the next look
        try:
            self.context = make_context(self._config)
        except StartupError as error:
            logger.error("%s: the TLS files stay as they were. %s", why, error)
        else:
            logger.info("%s: new connections get the certificate in %s.", why, self._config.ssl_certfile)

    def _print(self) -> _Print:
        config = self._config
        return tuple(map(_identity, (config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs)))


def make_context(config: HttpConfig) -> ssl.SSLContext:
    """A server's context with the files of `config`; protocols and ciphers are Python's.

    Raises StartupError.
    """
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(config.ssl_certfile), config.ssl_keyfile)
        context.verify_mode = ssl.VerifyMode(config.ssl_cert_reqs)
        if config.ssl_ca_certs is not None:
            context.load_verify_locations(config.ssl_ca_certs)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise StartupError(
            f"The TLS files cannot be used ({config.ssl_certfile}, {config.ssl_keyfile}): {error}.",
            param="--ssl-certfile",
        ) from error
    return context


def _identity(path: str | None) -> tuple[int, ...] | None:
    if path is None:
        return None
    try:
        found = os.stat(path)  # of what a link leads to
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
