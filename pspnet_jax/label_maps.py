"""Label maps: the class of each value, color or polygon category in a user's label files."""

import ast
from collections.abc import Mapping

from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import class_lists
from pspnet_jax.class_lists import Color
from pspnet_jax.errors import MissingFileError, UserError

Key = int | Color | str  # a value, a color, or the category of a polygon
Entries = dict[Key, str | int | None]  # the class's name or index; None: ignored
EXPECTED = "expected {value, (R, G, B) or 'category': 'class', index or None}, such as {0: 'cell', 255: None}, or a CSV file"


def read(dataset: ConfigDict) -> Entries:
    """Returns the entries of config.dataset.label_map, in their order; empty if it is not set.

    A CSV is as described in class_lists.py, and may be named relative to dataset.root. Its keys are label values, if it has a
    column of them, and colors.

    Raises:
      UserError: it is neither a dict of the expected types nor a list that can be parsed.
    """
    text = dataset.label_map.strip()
    if not text:
        return {}
    if not text.startswith("{"):
        return _read_csv(epath.Path(dataset.root).expanduser() / text, epath.Path(text).expanduser())
    try:
        entries = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(f"dataset.label_map={_short(text)}: {error}; {EXPECTED}") from error
    if not isinstance(entries, dict):
        raise UserError(f"dataset.label_map={_short(text)}: is no dict; {EXPECTED}")
    for key, value in entries.items():
        if not _is_key(key) or not (value is None or (type(value) in (str, int) and value not in ("", -1))):
            raise UserError(f"dataset.label_map: {key!r}: {value!r} is no entry; {EXPECTED}")
    written = [ast.unparse(key) for key in ast.parse(text, mode="eval").body.keys]
    if twice := {key for key in written if written.count(key) > 1}:
        raise UserError(f"dataset.label_map={_short(text)}: {min(twice)} is there twice; keep one of the two")
    if len(entries) < 2:
        raise UserError(f"dataset.label_map={_short(text)}: has fewer than two entries; {EXPECTED}")
    return entries


def class_names(entries: Mapping[Key, str | int | None]) -> tuple[str, ...]:
    """Returns the names in a map in the order of their first entries; () if it has indices, so that others name the classes."""
    classes = dict.fromkeys(value for value in entries.values() if value is not None)
    return tuple(name for name in classes if isinstance(name, str)) if all(isinstance(n, str) for n in classes) else ()


def _is_key(key: object) -> bool:
    if isinstance(key, tuple):
        return len(key) == 3 and all(type(channel) is int and 0 <= channel < 256 for channel in key)
    return type(key) in (int, str)


def _read_csv(*places: epath.Path) -> Entries:
    file = next((place for place in places if place.is_file()), None)
    if not file:
        raise MissingFileError(f"dataset.label_map={places[-1]}: no such file, also not in dataset.root; {EXPECTED}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    entries: Entries = {}
    for row in class_lists.read_rows(text, str(file)):
        for key in (row.label, row.color):
            if key is None:
                continue
            value = None if row.ignored else row.name
            if entries.setdefault(key, value) != value:
                raise UserError(f"{file}, line {row.line}: {key} is {entries[key]!r} in a line before; keep one of the two")
    if len(entries) < 2:
        raise UserError(f"{file}: lists fewer than two label values or colors with their classes; {EXPECTED}")
    return entries


def _short(text: str) -> str:
    return text if len(text) < 80 else f"{text[:80]}..."
