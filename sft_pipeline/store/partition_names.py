"""Which names a partition, that is a snapshot, can have: they become file names, keys in Dagster, and text on
screens."""

import unicodedata

MOST_BYTES = 200  # of 255 for a file name: a ref has an ending, and a longer one while it is written


def why_unusable(name: str) -> str | None:
    """Why no partition can have a name; None where it can."""
    if why := why_unwritable(name):
        return why
    if (length := len(name.encode())) > MOST_BYTES:
        return f"has {length} bytes, at most {MOST_BYTES} can be used"
    if not name.strip() or "/" in name or "..." in name or name in (".", ".."):
        return "cannot be used (it is empty or `..`, or has `/` or `...` in it)"
    return None


def why_unwritable(name: str) -> str | None:
    """Why a name cannot stand in JSON, in YAML and in a line of text; None where it can."""
    for character in name:
        category = unicodedata.category(character)
        if category == "Cs":
            return "is not UTF-8"
        if category in ("Cc", "Zl", "Zp"):
            return f"has the control character U+{ord(character):04X}"
    return None
