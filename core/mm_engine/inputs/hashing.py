"""Content keys: what decides an item's features, as one SHA-256. Never truncated."""

from __future__ import annotations

import hashlib

from PIL import Image


def content_key(modality: str, image: Image.Image, *options: str) -> str:
    """Hex SHA-256 over an image's pixels, size and mode, and over `options`.

    `options` name all else that its features depend on (the mapper and its settings, the plugin
    and its version, the checkpoint), and the tenant's salt.
    """
    digest = hashlib.sha256()
    for part in (modality, image.mode, f"{image.width}x{image.height}", *options):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))  # so that no two lists run together
        digest.update(encoded)
    digest.update(image.tobytes())
    return digest.hexdigest()
