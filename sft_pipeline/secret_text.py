"""Secrets of the environment, kept out of what is written, logged or put on a command line."""

import os
import re
from urllib.parse import parse_qsl, unquote, urlsplit

SHORTEST = 4  # characters; taking a shorter one out of a text would spoil it
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
HIDDEN = "***"
TOKEN = 12  # characters; a user's name without a password is a token from this length on
_SECRET_KEY = re.compile("pass|pwd|token|key|secret|sig|auth|cred", re.IGNORECASE)  # of a query


def public_address(address: str) -> str:
    """An address without user, password, query and fragment."""
    if "://" not in address:
        return address
    scheme, _, rest = address.partition("://")
    host, slash, path = re.split("[?#]", rest)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def redacted(text: str) -> str:
    """A text in which no secret of the environment can be read."""
    found = sorted(_secrets(), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, found)), HIDDEN, text) if found else text


def _secrets() -> set[str]:
    found = {os.environ.get(name, "") for name in _VARIABLES}
    for name in _ADDRESSES:
        parts = urlsplit(os.environ.get(name, ""))
        user, colon, password = parts.netloc.rpartition("@")[0].partition(":")
        found |= {f"{user}:{password}", password} if colon else {user} if len(user) >= TOKEN else set()
        found |= {value for key, value in parse_qsl(parts.query) if _SECRET_KEY.search(key)}
    return {spelled for secret in found for spelled in (secret, unquote(secret)) if len(spelled) >= SHORTEST}
