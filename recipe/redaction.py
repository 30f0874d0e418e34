"""Takes secrets out of every text that leaves the process: messages, files, requests that are logged."""

from __future__ import annotations

import os
import re

SECRET_VARIABLE = re.compile(r".*(TOKEN|KEY|SECRET|PASSWORD)")
SHORTEST_SECRET = 12  # characters of a variable's value; shorter ones may be words


def redact(text: str) -> str:
    """The text with the value of each secret environment variable replaced by `***`."""
    for name, value in os.environ.items():
        if SECRET_VARIABLE.fullmatch(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return text
