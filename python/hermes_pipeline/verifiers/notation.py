"""Numbers as answers write them, rewritten so that math-verify reads what was meant.

It takes `1\\,000` for 1 times 0 and `9 4` for a sum, leaves the base of `13_{7}` out, and does not
read `5.` at all.
"""

from __future__ import annotations

import re

_STOP = re.compile(r"(?<![.\\])(?<!left)(?<!right)\.$")
_SPACE = r"(?:\\[,;:! ]|[\s~])"
_THOUSANDS = re.compile(
    r"(?<![\d.^_])[1-9]\d{0,2}(?:SEPARATOR\d{3})+(?!\d|SEPARATOR\d)".replace(
        "SEPARATOR", r"(?:\\[,;: ]|,?\\!|\{,\}|~)\s*"
    )
)
_APART = re.compile(rf"[-+]?[\d./]*\d(?:{_SPACE}+\d[\d./]*)+")
_BASED = re.compile(r"(?<![\w.^\\])(\d+)\s*_\s*(?:\{\s*\(?\s*(\w+)\s*\)?\s*\}|(\d+))(?!\.?\d)")
_SUBSCRIPTED = re.compile(r"(?<!\^)\d\s*_")


def readable(text: str) -> str | None:
    """The same mathematics for math-verify; None where only the text itself can be compared.

    A number with a base becomes a symbol of its own, equal to the same digits in the same base
    alone: the task asked for that base, and its value in another one is no answer.
    """
    text = _STOP.sub("", text.strip().strip("$").rstrip()).rstrip()
    text = _THOUSANDS.sub(lambda number: re.sub(r"\D", "", number.group()), text)
    text = _BASED.sub(_symbol, text)
    if _APART.fullmatch(text) or _SUBSCRIPTED.search(text):
        return None
    return text


def _symbol(number: re.Match[str]) -> str:
    digits, base = number[1].lstrip("0") or "0", number[2] or number[3]
    return digits if base == "10" else rf"\xi_{{{digits}b{base}}}"
