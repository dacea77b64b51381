"""A picture as HTML: in a notebook, in a report, or as a page of its own that fetches nothing.

In: HTML and the scripts that draw it. Out: a `View`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from metaint.scans.whole import write_text

# In the head of every page that is written: whatever stands in it, nothing is fetched.
POLICY = (
    '<meta http-equiv="Content-Security-Policy"\n'
    " content=\"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:\">"
)
_PAGE = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
{POLICY}
<meta name="viewport" content="width=device-width, initial-scale=1"><title>metaint</title></head>
<body>{{}}</body></html>
"""


@dataclass(frozen=True)
class View:
    """A picture as HTML, which a notebook shows: its `scripts`, then its `body`.

    A page with several views needs each script once, before the first body. `source` says where what is shown comes
    from.
    """

    body: str = field(repr=False)
    scripts: tuple[str, ...] = field(default=(), repr=False)
    source: str = field(default="", repr=False)

    @property
    def html(self) -> str:
        return "".join(self.scripts) + self.body

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | Path) -> Path:
        """Write a page that fetches nothing; an earlier file is replaced once the new one is whole.

        StoreError if it can't be written.
        """
        write_text(Path(path), _PAGE.format(self.html))
        return Path(path)
