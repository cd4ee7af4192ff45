"""Numbers in text, as people and models write them.

-1,234.5   $18   40% (a unit: 40)   1 234   1_234   1e3   3/4   2 1/2   ½   2½   \\frac{5}{2}   10^6   10^{-3}
3 \\times 10^4   2.5 million   –3 (en dash)   −3 (minus sign)
"""

import math
import re
import unicodedata

_SPACE = "[ \\u00a0\\u2009\\u202f]"  # plain, no-break, thin
# Digits in groups of three, or plain, with a decimal part; not from the middle of a longer number.
_DIGITS = (
    rf"(?:(?<![\d.])\d{{1,3}}(?:,\d{{3}})+(?![\d,])(?:\.\d+)?|(?<![\d.])\d{{1,3}}(?:_\d{{3}})+(?![\d_])(?:\.\d+)?"
    rf"|(?<![\d.])(?<!\d{_SPACE})[1-9]\d{{0,2}}(?:{_SPACE}\d{{3}})+(?![\d.,]*\d)(?!{_SPACE}\d)(?:\.\d+)?"
    r"|\d+(?:\.\d+)?(?:[eE][-+]?\d+(?!\w))?|(?<!\d)\.\d+)"
)
_HALVES = "".join(chr(c) for c in range(0x2190) if unicodedata.decomposition(chr(c)).startswith("<fraction>"))
_POWER = r"\^\s?\{{?\s?(?P<{}>[-+]?\d+)\s?\}}?"
_BRACES = r"\{{\s?(?P<{}>-?\d+(?:\.\d+)?)\s?\}}"
_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
# A minus is a sign unless it follows a digit, a letter or a closing bracket ("10-5", "T-5").
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])[-+]\s?)?(?P<unit>\\?[$€£¥]\s?)?(?P<sign2>(?<=[$€£¥])-)?(?:"
    rf"(?:(?P<whole3>\d+)\s?)?\\[dt]?frac\s?{_BRACES.format('top3')}\s?{_BRACES.format('bottom3')}"
    rf"|(?P<whole4>\d+)?\s?(?P<vulgar>[{_HALVES}])"
    r"|(?P<whole>\d+)\s+(?P<top>\d+)/(?P<bottom>\d+)|(?P<top2>\d+)/(?P<bottom2>\d+)(?!\d*/)"
    rf"|(?P<number>{_DIGITS})"
    rf"(?:\s?(?:\\times|\\cdot|[x×*·])\s?10{_POWER.format('exponent')}|\s?{_POWER.format('power')})?"
    rf")(?:\s?(?P<scale>{'|'.join(_SCALES)})\b)?",
    re.IGNORECASE,
)
_MINUS = str.maketrans(dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{NON-BREAKING HYPHEN}", "-"))


def numbers(text: str) -> list[float]:
    """The numbers of a text, in order."""
    found = (_value(m) for m in _NUMBER.finditer(text.translate(_MINUS)))
    return [v for v in found if v is not None]


def last_number(text: str) -> float | None:
    """None where there is none."""
    found = numbers(text)
    return found[-1] if found else None


def first_number_after(text: str, mark: str) -> float | None:
    """The first number after the last occurrence of `mark`; None where either is absent."""
    _, there, tail = text.rpartition(mark)
    found = numbers(tail) if there else []
    return found[0] if found else None


def _value(match: re.Match[str]) -> float | None:
    parts = match.groupdict()
    try:
        value = _magnitude(parts)
    except (OverflowError, ZeroDivisionError):
        return None
    if parts["scale"]:
        value *= _SCALES[parts["scale"].lower()]
    negative = (parts["sign"] or "").strip() == "-" or parts["sign2"] is not None
    if not math.isfinite(value):
        return None
    return -value if negative else value


def _magnitude(parts: dict[str, str | None]) -> float:
    """The value without its sign and scale.

    Raises:
        OverflowError, ZeroDivisionError: It has none.
    """
    if parts["vulgar"]:
        return int(parts["whole4"] or 0) + unicodedata.numeric(parts["vulgar"])
    for n in ("", "2", "3"):
        if parts[f"top{n}"] is not None:
            whole = 0 if n == "2" else int(parts[f"whole{n}"] or 0)
            return whole + float(parts[f"top{n}"] or 0) / float(parts[f"bottom{n}"] or 0)
    value = float(re.sub(rf"[,_]|{_SPACE}", "", parts["number"] or ""))
    if parts["power"] is not None:
        return value ** int(parts["power"])
    return value * 10.0 ** int(parts["exponent"]) if parts["exponent"] is not None else value
