"""Secrets of the environment, kept out of what is written, logged or put on a command line."""

import os
import re
import traceback
from urllib.parse import parse_qsl, quote, quote_plus, unquote

SHORTEST = 4  # characters; taking a shorter one out of a text would spoil it
HIDDEN = "***"
TOKEN = 12  # characters; a user's name without a password is a token from this length on
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_SECRET_VARIABLE = re.compile(
    r"(TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|API_?KEY|ACCESS_KEY)$", re.IGNORECASE
)
OTHERS_SHORTEST = 8  # characters of a secret in a variable that this package does not know
_SECRET_KEY = re.compile("pass|pwd|token|key|secret|sig|auth|cred", re.IGNORECASE)  # of a query
_USER_INFO = re.compile(r"(?<=://)[^\s/?#@'\"]+(?=@)")  # of any address in a text


def public_address(address: str) -> str:
    """An address without user, password, query and fragment."""
    if "://" not in address:
        return address
    scheme, _, rest = address.partition("://")
    # A password may hold "/", "?", "#" and "@" that nobody escaped: all before the last "@" is left out.
    return f"{scheme}://{re.split('[?#]', rest.rpartition('@')[2])[0]}"


def redacted(text: str) -> str:
    """A text in which no secret of the environment can be read, and no address's user and password."""
    found = sorted(_secrets(), key=len, reverse=True)
    hidden = re.sub("|".join(map(re.escape, found)), HIDDEN, text) if found else text
    return _USER_INFO.sub(_hidden_user, hidden)


def holds_secret(error: BaseException) -> bool:
    """Whether a secret can be read in an exception, its causes or its traceback."""
    said = "".join(traceback.format_exception(error))
    return redacted(said) != said


def _hidden_user(found: re.Match[str]) -> str:
    user = found[0]
    return HIDDEN if ":" in user or len(user) >= TOKEN else user


def _secrets() -> set[str]:
    found = {os.environ.get(name, "") for name in _VARIABLES}
    for name, value in os.environ.items():
        inside = _secrets_of(value) if "://" in value else set()
        if _SECRET_VARIABLE.search(name):
            inside.add(value)
        found |= {s for s in inside if name in _ADDRESSES or len(s) >= OTHERS_SHORTEST}
    spellings = {s for secret in found for plain in (secret, unquote(secret)) for s in _spellings(plain)}
    return {spelled for spelled in spellings if len(spelled) >= SHORTEST}


def _secrets_of(address: str) -> set[str]:
    """The password, or the token in the place of a user, and the secrets of the query."""
    rest = address.partition("://")[2]
    found: set[str] = set()
    # An "@" may stand unescaped in the password, or in the query.
    for user_info in {rest.partition("@")[0], rest.rpartition("@")[0]} if "@" in rest else ():
        user, colon, password = user_info.partition(":")
        found |= {user_info, password} if colon else {user} if len(user) >= TOKEN else set()
        found.add(re.split("[/?#]", password)[0])  # which libraries take for a port, and name as a wrong one
    query = rest.partition("?")[2].partition("#")[0]
    raw = (item.partition("=") for item in query.split("&"))
    pairs = [*parse_qsl(query), *((key, value) for key, _, value in raw)]
    return found | {value for key, value in pairs if _SECRET_KEY.search(key)}


def _spellings(secret: str) -> set[str]:
    """As it is, as in an address, and as text in JSON and in Python's own notation."""
    return {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), ascii(secret)[1:-1]}
