"""Rows of the files that data sets come in beside JSON lines: parquet, CSV, JSON arrays, folders of
``datasets``."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import parse_json, read_json, read_json_object

LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*LINES, ".parquet", ".csv")
_SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")  # what save_to_disk writes beside the data
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")
BATCH = 1000  # rows in memory at a time
_NOT_UTF8 = "expected text in UTF-8, found other bytes; save the file as UTF-8"


def is_table(path: Path) -> bool:
    """Is it read by ``table_rows``, and not line by line?"""
    return path.is_dir() or path.suffix in (".parquet", ".csv") or (path.suffix == ".json" and _holds(path) != "lines")


def table_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, JSON) of each row, in order and counted from 1; JSON arrays and CSV are read whole, others in parts.

    A folder is one of ``datasets.save_to_disk``, or holds parquet, JSON-lines or JSON files of one split, which are
    read in the order of their names. A ``.json`` file whose text is one object, as MATH has them, is one row.

    Raises:
        UserError: the folder holds no data or several splits, a file is damaged, or its text is not UTF-8. See
            ``read_json`` for a JSON array.
    """
    for number, row in enumerate(_rows(path), 1):
        try:
            line = row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=True, default=_plain).encode()
        except UnicodeDecodeError:
            raise UserError(f"{path}: row {number}: {_NOT_UTF8}") from None
        yield number, line


def _plain(value: Any) -> str:
    """Bytes are text: some programs write the texts of a parquet file so."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _rows(path: Path) -> Iterator[Any]:
    if path.is_dir():
        if (path / _SAVED[0]).is_file() or (path / _SAVED[2]).is_file():
            yield from _saved(path)
            return
        for part in _parts(path):
            yield from _rows(part)
    elif path.suffix in (".parquet", ".csv"):
        yield from _table(path)
    elif (kind := _holds(path)) != "lines":
        yield from read_json(path) if kind == "array" else [read_json(path)]
    else:
        with path.open("rb") as file:
            yield from (line for line in file if line.strip())


def splits_of(path: Path) -> dict[str, list[Path]]:
    """The files or ``save_to_disk`` folders of each split below a folder, sorted; "" where no name tells one.

    A file belongs to the split that its name holds (``gsm8k_train.jsonl``), else to that of the nearest folder so
    named. Of a file, or a folder of one data set, it is that path alone.

    Raises:
        UserError: the folder holds no data.
    """
    if not path.is_dir() or (path / _SAVED[0]).is_file():
        return {"": [path]}
    if (path / _SAVED[2]).is_file():
        return {name: [path / name] for name in read_json_object(path / _SAVED[2]).get("splits", ())}
    parts = sorted(
        part
        for part in path.rglob("*")
        if part.suffix in SUFFIXES and part.name not in _SAVED and not part.relative_to(path).as_posix().startswith(".")
    )
    if not parts:
        raise UserError(f"{path}: expected a file of JSON lines, found a directory without JSON lines, parquet or CSV")
    found: dict[str, list[Path]] = {}
    for part in parts:
        names = reversed(part.relative_to(path).parts)
        found.setdefault(next((match[1] for name in names if (match := _SPLIT.search(name.lower()))), ""), []).append(
            part
        )
    return found


def _parts(folder: Path) -> list[Path]:
    splits = splits_of(folder)
    named = sorted(splits.keys() - {""})
    if len(named) > 1:
        raise UserError(
            f"{folder}: holds several splits ({', '.join(named)}); name one file, such as {splits[named[0]][0]}"
        )
    return sorted(part for parts in splits.values() for part in parts)


def _saved(folder: Path) -> Iterator[Any]:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow, datasets and json each have their own
        raise UserError(f"{folder}: the data set does not load: {_clause(error)}") from None
    if not isinstance(found, datasets.Dataset):
        raise UserError(f"{folder}: holds several splits; name one, such as {folder / next(iter(found))}")
    yield from _python(found.with_format("arrow").iter(batch_size=BATCH))


def _table(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                yield from _python(file.iter_batches(BATCH))
        else:
            yield from _python(_csv(path).to_batches(BATCH))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: names of columns
        why = (
            _NOT_UTF8
            if "UTF8" in str(error) or isinstance(error, UnicodeDecodeError)
            else f"expected a {path.suffix[1:]} file, it does not read: {_clause(error)}"
        )
        raise UserError(f"{path}: {why}") from None


def _csv(path: Path) -> Any:
    """The file's table: every cell is the text as written, an empty one is null. ``as_flag`` reads what must not be.

    Types that are guessed change answers: 7 becomes 7.0 beside a number of more than 64 bits, 10:30 a time of day, and
    True, where all answers are True or False, no text at all. Quotes do not tell: a guess ignores them.
    """
    import pyarrow as pa
    import pyarrow.csv as pc

    parse = pc.ParseOptions(newlines_in_values=True)
    with pc.open_csv(path, parse_options=parse) as start:
        texts = dict.fromkeys(start.schema.names, pa.string())
    convert = pc.ConvertOptions(strings_can_be_null=True, null_values=[""], column_types=texts)
    return pc.read_csv(path, parse_options=parse, convert_options=convert)


_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def as_flag(value: Any) -> Any:
    """The boolean that a cell of CSV means, for a field that holds one; anything else unchanged, to be refused there.

    1.0 and 0.0 are what pandas makes of flags with gaps.
    """
    return _FLAGS.get(value.strip().lower(), value) if isinstance(value, str) else value


def _python(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        yield from batch.to_pylist()


def _holds(path: Path) -> Literal["lines", "array", "object"]:
    """JSON lines, one array or, in a ``.json`` file, one object over several lines?"""
    if not path.is_file():
        return "lines"
    with path.open("rb") as file:
        while (first := file.read(1)).isspace():
            pass
        line = first + file.readline() if first == b"{" and path.suffix == ".json" else b"{}"
    try:
        parse_json(line)
    except ValueError:
        with contextlib.suppress(UserError):
            return "object" if isinstance(read_json(path), dict) else "lines"
    return "array" if first == b"[" else "lines"


def _clause(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
