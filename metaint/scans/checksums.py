"""Checksums of a store's files, in the attributes of its root: wrong bytes and lost files are told, and named.

In: the folder of a Zarr store. Out: its table of checksums, or StoreError. A store that others wrote has no table and
is taken as it is. The table holds, by file, the CRC-32 of

- a file that is written once: all its bytes;
- a chunk of a recording: the rows that count, since what a kill leaves behind them is no harm;
- the metadata of a recording's array: all but the number of rows;
- and, as "", of the root's other attributes.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metaint.errors import StoreError

# The attribute of the root that holds the table; what is read has it no more.
TABLE = "checksums"
_ROOT = "zarr.json"

Table = dict[str, int]


def seal(folder: Path, records: int | None = None) -> None:
    """Add the table to the root of a store; `records` of a recording, whose arrays will grow."""
    root = json.loads((folder / _ROOT).read_text())
    arrays: dict[str, Any] = {}
    names = sorted((name for name in _files(folder) if name != _ROOT), key=_chunks_last)
    table = {name: zlib.crc32(_lasting(folder, name, records, arrays)) for name in names}
    (folder / _ROOT).write_text(json.dumps(sealed(root, table)))


def sealed(root: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """The root's metadata with a table, and in it the checksum of its other attributes."""
    attributes = {name: value for name, value in root["attributes"].items() if name != TABLE}
    whole = {"": _crc_of_json([attributes, {name: crc for name, crc in table.items() if name}])}
    return {**root, "attributes": {**attributes, TABLE: {**table, **whole}}}


def root_metadata(folder: Path) -> dict[str, Any]:
    """The root's metadata, checked by its own checksum if it has one; StoreError where it is damaged."""
    try:
        root = json.loads((folder / _ROOT).read_bytes())
        table = root.setdefault("attributes", {}).get(TABLE)
        if table is not None and sealed(root, table) != root:
            raise ValueError
    except FileNotFoundError:
        return {"attributes": {}}  # an older form of Zarr, which only others write
    except (ValueError, AttributeError, TypeError) as error:
        raise damaged(folder, _ROOT) from error
    return root


def verify(folder: Path, table: Table | None, records: int | None = None) -> None:
    """StoreError, which names the file, where one is lost or its bytes are other ones; `records` of a recording."""
    arrays: dict[str, Any] = {}
    table = table or {}
    for name in sorted((name for name in table if name), key=_chunks_last):
        try:
            crc = zlib.crc32(_lasting(folder, name, records, arrays))
        except FileNotFoundError:
            raise StoreError(f"{folder} is damaged: {name} is missing.") from None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise damaged(folder, name) from error
        if crc != table[name]:
            raise damaged(folder, name)


def damaged(folder: Path, name: str) -> StoreError:
    return StoreError(f"{folder} is damaged: {name} does not hold what was written there.")


def metadata_crc(about: Mapping[str, Any]) -> int:
    """The checksum of an array's metadata, however many rows it has."""
    return zlib.crc32(_lasting_metadata(about))


def chunk_and_row(about: Mapping[str, Any], index: int) -> tuple[str, int]:
    """Where row `index` of an array lies: the name of its chunk in the array's folder, and its place there."""
    shape = about["chunk_grid"]["configuration"]["chunk_shape"]
    number, place = divmod(index, shape[0])
    return "/".join(["c", str(number), *["0"] * (len(shape) - 1)]), place


def _lasting(folder: Path, name: str, records: int | None, arrays: dict[str, Any]) -> bytes:
    """What of a file does not change any more; `arrays` keeps the metadata of those that grow."""
    content = (folder / name).read_bytes()
    if records is None:
        return content
    if name.endswith("/zarr.json"):
        about = json.loads(content)
        if not _grows(about):
            return content
        arrays[name.removesuffix("/zarr.json")] = about
        return _lasting_metadata(about)
    array = name.partition("/c/")[0]
    if array not in arrays:
        return content
    about = arrays[array]
    shape = about["chunk_grid"]["configuration"]["chunk_shape"]
    first = int(name.partition("/c/")[2].split("/")[0]) * shape[0]
    row = math.prod(shape[1:]) * _item_size(about)
    if len(content) != shape[0] * row:
        raise ValueError
    return content[: min(shape[0], records - first) * row]


def _grows(about: Mapping[str, Any]) -> bool:
    return (about.get("dimension_names") or [""])[0] == "step"


def _lasting_metadata(about: Mapping[str, Any]) -> bytes:
    return json.dumps({**about, "shape": about["shape"][1:]}, sort_keys=True).encode()


def _item_size(about: Mapping[str, Any]) -> int:
    """The bytes of a number, whose type has a name like float32, int64 or bool."""
    bits = about["data_type"].lstrip("abcdefghijklmnopqrstuvwxyz")
    return int(bits) // 8 if bits else 1


def _crc_of_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _chunks_last(name: str) -> tuple[bool, str]:
    """Metadata before chunks, which are read by it."""
    return not name.endswith(_ROOT), name


def _files(folder: Path) -> list[str]:
    """Every file in a folder by its path there."""
    paths = (Path(where, file) for where, _, names in os.walk(folder) for file in names)
    return sorted(path.relative_to(folder).as_posix() for path in paths)
