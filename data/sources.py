"""What there is to pack: a folder of files, a table, or WebDataset tars -> one list of items, in a fixed order.

Nothing is extracted and no name of a source becomes a path to write to.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.images import SUFFIXES
from data.s3 import DataError

MAX_FILE = 512 << 20
MAX_TEXT = 1 << 20
TABLES = (".jsonl", ".csv", ".parquet")
_SOURCE = ".source"
_METADATA = tuple(f"metadata{suffix}" for suffix in TABLES)


class Span(NamedTuple):
    """Bytes of a file; size None: all of it."""

    path: str
    offset: int = 0
    size: int | None = None

    def read(self, limit: int, most: int | None = None) -> bytes:
        """All bytes, or the first `most`. Raises DataError where there are more than `limit` or they cannot be read."""
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size if self.size is None else self.size
                if size > limit:
                    raise DataError(f"a file of more than {limit} bytes")
                size = size if most is None else min(size, most)
                file.seek(self.offset)
                body = file.read(size)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})") from error
        if len(body) != size:
            raise DataError(f"cut short ({len(body)} of {size} bytes)")
        return body


class Columns(NamedTuple):
    """Names of columns, or of fields of a .json member. captions: the first that a row has (a text or a list); source:
    path of the source image of an edit."""

    image: str = "file_name"
    captions: tuple[str, ...] = ("captions", "caption", "text", "instruction")
    score: str | None = None
    source: str = "source"


@dataclass(frozen=True, slots=True)
class Item:
    """One image and where its captions stand: row of a table, .json or .txt beside it, in this order. image: None where
    captions alone are packed; source: the source image of an edit."""

    name: str
    image: Span | None
    row: dict[str, Any] | None = None
    record: Span | None = None
    text: Span | None = None
    source: Span | None = None

    def fields(self) -> dict[str, Any]:
        """The item's row or record. Raises DataError where it is no JSON object."""
        if self.row is not None or self.record is None:
            return self.row or {}
        try:
            found = json.loads(self.record.read(MAX_TEXT))
        except (ValueError, RecursionError) as error:
            raise DataError("its .json is not valid JSON") from error
        if not isinstance(found, dict):
            raise DataError("its .json is not an object")
        return found

    def captions(self, columns: Columns, fields: dict[str, Any]) -> tuple[str, ...]:
        """Its captions, without those that are empty. Raises DataError where none is left."""
        found = next((fields[name] for name in columns.captions if fields.get(name)), None)
        if found is None and self.text is not None:
            try:
                found = self.text.read(MAX_TEXT).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise DataError("its caption is not UTF-8 text") from error
        texts = found if isinstance(found, list) else [found]
        captions = tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
        if not captions:
            raise DataError("no caption")
        if sum(len(caption.encode(errors="replace")) for caption in captions) > MAX_TEXT:
            raise DataError(f"more than {MAX_TEXT} bytes of captions")
        return captions


def list_items(source: Path, columns: Columns, kind: str = "images") -> list[Item]:
    """All items of a folder, of a table (or a folder with metadata.jsonl, .csv or .parquet), or of tars.

    kind: images; captions (images are not looked for; also a .txt file with one caption a line); or edits, where the
    source image of <name>.png is named by the table or is <name>.source.png (any image suffix).
    Raises DataError where nothing is found, a table cannot be read, or a tar holds pickles or hostile names.
    """
    if source.is_file():
        if source.suffix == ".tar":
            items = _from_tars([source], kind)
        elif source.suffix == ".txt" and kind == "captions":
            items = list(_from_lines(source))
        else:
            items = list(_from_table(source, columns, kind))
    elif source.is_dir():
        files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names)
        table = next((source / name for name in _METADATA if (source / name).is_file()), None)
        tars = [Path(name) for name in files if name.endswith(".tar")]
        if table is not None:
            items = list(_from_table(table, columns, kind))
        else:
            items = _from_files(source, files, kind)
            if items and tars:
                raise DataError(f"{source}: holds files and tars ({tars[0].name}); pack them one by one")
            items = items or _from_tars(tars, kind)
    else:
        raise DataError(f"{source}: no such file or folder")
    if not items:
        wanted = ".txt files" if kind == "captions" else f"{', '.join(SUFFIXES)} files"
        raise DataError(f"{source}: no {kind}; expected {wanted}, a table {TABLES}, or .tar files")
    return items


def _from_files(source: Path, files: list[str], kind: str) -> list[Item]:
    grouped: dict[str, dict[str, Span]] = {}
    for path in files:
        folder, name = os.path.split(path)
        stem, _, suffix = name.rpartition(".")
        if stem.endswith(_SOURCE) and suffix.lower() in SUFFIXES:
            stem, suffix = stem.removesuffix(_SOURCE), f"source.{suffix}"
        grouped.setdefault(os.path.join(folder, stem), {})[suffix] = Span(path)
    items = []
    for stem, members in grouped.items():
        for suffix in _packed(members, kind):
            items.append(_item(os.path.relpath(f"{stem}.{suffix}", source), suffix, members, kind))
    return sorted(items, key=lambda item: os.path.join(source, item.name))


def _from_tars(tars: list[Path], kind: str) -> list[Item]:
    from data.index import index_tar

    items = []
    for tar in tars:
        index = index_tar(tar)
        for number, key in enumerate(index.keys):
            members = {suffix: Span(str(tar), *span) for suffix, span in index.members(number).items()}
            for suffix in _packed(members, kind)[:1]:
                items.append(_item(f"{tar.name}/{key}.{suffix}", suffix, members, kind))
    return items


def _packed(members: dict[str, Span], kind: str) -> list[str]:
    """Suffixes of the members that make an item each: images, or the file of the captions."""
    if kind == "captions":
        return [suffix for suffix in members if suffix in ("json", "txt")][:1]
    return sorted((s for s in members if s.lower() in SUFFIXES), key=lambda suffix: SUFFIXES.index(suffix.lower()))


def _item(name: str, suffix: str, members: dict[str, Span], kind: str) -> Item:
    source = next((span for found, span in members.items() if found.startswith("source.")), None)
    return Item(
        name,
        None if kind == "captions" else members[suffix],
        record=members.get("json"),
        text=members.get("txt"),
        source=source if kind == "edits" else None,
    )


def _from_lines(file: Path) -> Iterator[Item]:
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Item(f"{file.name}, line {number}", None, row={"caption": line.strip()})
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from error


def _from_table(table: Path, columns: Columns, kind: str) -> Iterator[Item]:
    root = table.absolute().parent
    wanted = {*columns.captions, columns.score}
    for number, row in enumerate(_rows(table, columns)):
        kept = {key: value for key, value in row.items() if key in wanted}
        where = f"{table}, row {number}"
        if kind == "captions":
            yield Item(str(row.get(columns.image) or f"row {number}"), None, row=kept)
            continue
        image = _path(row, columns.image, "--image-column", root, where)
        source = _path(row, columns.source, "--source-column", root, where) if kind == "edits" else None
        yield Item(str(row[columns.image]), image, row=kept, source=source)


def _path(row: dict[str, Any], column: str, option: str, root: Path, where: str) -> Span:
    name = row.get(column)
    if not isinstance(name, str) or not name:
        raise DataError(
            f"{where}: column {column!r} is {name!r:.80}, not the path of an image file; set {option} (images inside a "
            "table are not supported: write them as files)"
        )
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(root):
        raise DataError(f"{where}: {name} leads outside {root}; move the table above its images")
    return Span(str(path))


def _rows(table: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    try:
        if table.suffix == ".jsonl":
            with open(table, encoding="utf-8") as lines:
                for number, line in enumerate(lines):
                    row = json.loads(line) if line.strip() else None
                    if row is not None and not isinstance(row, dict):
                        raise DataError(f"{table}, line {number + 1}: not a JSON object")
                    if row is not None:
                        yield row
        elif table.suffix == ".csv":
            with open(table, encoding="utf-8-sig", newline="") as file:
                yield from csv.DictReader(file)
        elif table.suffix == ".parquet":
            yield from _parquet_rows(table, columns)
        else:
            raise DataError(f"{table}: not a table that can be read; expected one of {', '.join(TABLES)}, or .tar")
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"{table}: cannot be read as a table ({error})") from error


def _parquet_rows(table: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{table}: Parquet needs pyarrow; pip install pyarrow, or write the table as .jsonl") from error
    wanted = {columns.image, columns.source, *columns.captions, columns.score}
    with parquet.ParquetFile(table) as file:
        for batch in file.iter_batches(columns=[name for name in file.schema_arrow.names if name in wanted]):
            yield from batch.to_pylist()
