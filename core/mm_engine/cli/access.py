"""Who may come in: what flags, files and the environment say of keys and certificates."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from mm_engine.errors import StartupError

KEY_VARIABLE = "MM_ENGINE_API_KEY"


def api_keys(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """The keys of flag or variable, and those of the file.

    Raises:
        StartupError: one can't be read, or the variable is there and holds none: a server that
            was meant to want a key would want none.
    """
    from mm_engine.server.keys import read_keys

    if not given and KEY_VARIABLE in os.environ:
        raise StartupError(f"{KEY_VARIABLE} is set, but holds no key. Give it one, or unset it.")
    return read_keys(given or (), file)


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Refuse a certificate that can't be used before a model is loaded.

    Raises:
        StartupError: it can't be read, or the key isn't its own.
    """
    if certificate is None:
        if key is not None:
            raise StartupError("--ssl-keyfile needs a certificate. Give --ssl-certfile, too.")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        cause = getattr(error, "reason", None) or getattr(error, "strerror", None) or "unreadable"
        raise StartupError(
            f"the certificate can't be used: {certificate} ({str(cause).lower()}). "
            "Check --ssl-certfile and --ssl-keyfile: PEM, and the key is the certificate's."
        ) from None
