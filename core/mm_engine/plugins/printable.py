"""What plugins say, made fit for a terminal and for JSON: nothing in it acts or can't be written.

A message of a plugin may hold escape sequences, which a terminal would obey, and lone surrogates,
which no encoding can write. Both are shown as Python writes them in a string.
"""

from __future__ import annotations

import json
import re
from typing import Any

#: Control characters (but for the line's end), the directions of text, and lone surrogates.
UNPRINTABLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return `text` with what can't be shown escaped: `\\x1b[31m`, `\\ud800`."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def to_json(value: Any) -> str:
    """Return `value` as indented JSON that any terminal and any encoding of Unicode takes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return UNPRINTABLE.sub(lambda found: json.dumps(found[0])[1:-1], text)
