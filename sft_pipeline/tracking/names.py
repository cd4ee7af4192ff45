"""Names of metrics and parameters as MLflow takes them. What it takes already stays as it is."""

import hashlib
import json
import posixpath
import re
from typing import Any

LONGEST = 250  # characters of a name
_REFUSED = re.compile(r"[^/\w. \-]")  # a colon too: servers on Windows refuse it
_ESCAPE = re.compile("-x[0-9a-f]*-")
_HEAD = 180  # characters that are kept of a name that is too long, before its digest


def accepted_name(name: str) -> str:
    """A name that MLflow accepts, another one for every name: "a%b" becomes "a-x25-b".

    A character that is refused is written as its code point between "-x" and "-". Hyphens are written so too
    wherever a name is changed, and names that hold such a sequence themselves are changed: therefore the
    original can always be told. A name that is too long ends in its SHA-256.
    """
    # MLflow takes a name for a path, and refuses one that is not in its shortest form.
    path = posixpath.normpath(name)
    plain = path == name and path != "." and not path.startswith(("..", "/"))
    found = name
    if not plain or _REFUSED.search(name) or _ESCAPE.search(name):
        marked = "-" if plain else "-/."
        found = "".join(f"-x{ord(c):x}-" if c in marked or _REFUSED.match(c) else c for c in name) or "-x-"
    if len(found) > LONGEST:
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
        found = f"{found[:_HEAD]}-x{digest}-"
    return found


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as {"a.b": "text"}; a key that holds a dot itself is quoted."""
    if isinstance(value, dict) and value:
        return {
            k: v for name, inner in value.items() for k, v in flatten(inner, f"{prefix}{_key(name)}.").items()
        }
    return {prefix.removesuffix("."): "null" if value is None else str(value)}


def _key(name: Any) -> str:
    text = str(name)
    return json.dumps(text) if not text or "." in text or '"' in text else text
