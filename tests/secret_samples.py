"""Secrets as they are copied into environment variables, and the spellings in which a text may hold them."""

import base64
import html
import json
import shlex
from collections.abc import Mapping
from urllib.parse import quote, quote_plus

# what the variable holds, and the secret itself
SECRETS = {
    "OPENAI_API_KEY": ("sk-test-Zq3-0123456789abcdef\r", "sk-test-Zq3-0123456789abcdef"),
    "STORE_TOKEN": (" “q/Zm9v+YmFyN+cXV4/Qw==” ", "q/Zm9v+YmFyN+cXV4/Qw=="),
    "db_password": ("pä%2Fss'wörd€ \"&<x>-77%", "pä%2Fss'wörd€ \"&<x>-77%"),
}


def spellings(secret: str) -> Mapping[str, str]:
    """What other libraries make of a secret: those that a text must not hold."""
    utf8 = secret.encode()
    return {
        "plain": secret,
        "repr": repr(secret)[1:-1],
        "ascii": ascii(secret)[1:-1],
        "bytes": repr(utf8)[2:-1],
        "json": json.dumps(secret)[1:-1],
        "json, slashes escaped": json.dumps(secret)[1:-1].replace("/", "\\/"),
        "json in json": json.dumps(json.dumps(secret))[3:-3],
        "quote": quote(secret),
        "quote, no slash": quote(secret, safe=""),
        "quote, lower case": "".join(c if c.isascii() and c.isalnum() else quote(c, safe="").lower() for c in secret),
        "quote twice": quote(quote(secret, safe="")),
        "quote_plus": quote_plus(secret),
        "percent": "".join(f"%{byte:02X}" for byte in utf8),
        "html": html.escape(secret),
        "html of json": html.escape(json.dumps(secret)[1:-1]),
        "character references": secret.encode("ascii", "xmlcharrefreplace").decode(),
        "all character references": "".join(f"&#{ord(char)};" for char in secret),
        "base64": base64.b64encode(utf8).decode().rstrip("="),
        "basic": base64.b64encode(b"me:" + utf8).decode().rstrip("="),
        "basic, no user": base64.urlsafe_b64encode(b":" + utf8).decode().rstrip("="),
        "shell": shlex.quote(secret),
        "hexadecimal": utf8.hex(),
        "latin-1": utf8.decode("latin-1"),
    }
