"""Text that goes out: what a model's tokens or a path may hold, and files and other programs can't take.

In: any string. Out: one that UTF-8 and XML can hold, or a cell that no spreadsheet runs.
"""

import re

# Lone halves of a pair in UTF-16, which UTF-8 can't write.
_SURROGATES = re.compile("[\ud800-\udfff]")
# Characters that XML 1.0 has no way to write.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
# A cell that begins so is run as a formula; a number may begin with a sign.
_FORMULA = re.compile(r"^[=+\-@\t\r]")


def writable(text: str) -> str:
    """The text with a replacement character for what UTF-8 can't write."""
    return _SURROGATES.sub("\ufffd", text)


def xml_writable(text: str) -> str:
    """The same for XML, which can't write most control characters either."""
    return _CONTROLS.sub("\ufffd", writable(text))


def cell(text: str) -> str:
    """The text for a spreadsheet, after an apostrophe where it would be run as a formula."""
    text = writable(text)
    return f"'{text}" if _FORMULA.match(text) else text
