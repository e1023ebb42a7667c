"""What makes a self-contained page safe: data that cannot become markup, a policy that runs its own script alone."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any


def coded(data: Any) -> str:
    """Data as JSON for a script element: ASCII, on one line, `<`, `>` and `&` as \\uXXXX; ValueError on NaN."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def policy(template: str, more: str = "") -> str:
    """Content policy that runs the template's one script and style, and loads nothing but what `more` says."""
    return f"default-src 'none'; script-src {_hash(template, 'script')}; style-src {_hash(template, 'style')}{more}"


def _hash(template: str, tag: str) -> str:
    body = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"
