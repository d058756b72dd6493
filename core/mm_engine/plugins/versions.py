"""Which versions of mm-engine a plugin was made for: the range in its own requirements."""

from __future__ import annotations

import re
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

ENGINE = "mm-engine"


def normalized(distribution: str) -> str:
    """Return a distribution's name as two spellings of it compare: `Mm_Foo` is `mm-foo`."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def unmet_range(distribution: str) -> str | None:
    """Return the requirement on mm-engine that the running version doesn't meet, or None.

    It reads as the distribution wrote it: `mm-engine<0.2,>=0.1`. Pre-releases count as versions.
    """
    try:
        running = Version(metadata.version(ENGINE))
    except (metadata.PackageNotFoundError, InvalidVersion):
        return None  # running from a folder that was never installed: nothing to compare with
    try:
        requires = metadata.distribution(distribution).requires or ()
    except metadata.PackageNotFoundError:
        return None  # its folder has another name than it: whoever loads it says so
    for text in requires:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue  # pip would have refused it: then it says nothing of mm-engine
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        named = normalized(wanted.name) == ENGINE
        if named and applies and not wanted.specifier.contains(running, prereleases=True):
            return f"{wanted.name}{wanted.specifier}"
    return None
