"""Reading a user's list of classes: classes.txt, or a class_dict.csv with a header.

| line | meaning |
| --- | --- |
| `sky` | the next class |
| `sky 128 128 128`, `sky,128,128,128`, `"sky"; 128; 128; 128`, `sky #808080` | with its color |
| `128 128 128 sky`, `128,128,128,sky` | the same, if all lines start with a color |
| `0 sky`, `0: sky`, `0,sky,128,128,128` | the class of label 0, if all lines start with a label; a line for 255 is ignored |
| `name,r,g,b`, `id;name`, `value,name,ignored` | a header that names the columns; a class that is ignored is not listed |
| `sky:128,128,128::` | CVAT's labelmap.txt |
| `# a comment`; `__ignore__` as the first line, as labelme has it | ignored |

In a .json file, the first of these counts: `[{"name": "sky", "id": 0, "color": "#808080"}]`, `["sky"]`, `{"#808080": "sky"}`,
`{"0": "sky"}`, `{"sky": 0}`, `{"sky": [128, 128, 128]}`.
"""

import csv
import json
import re
from typing import Any, NamedTuple, NoReturn

from pspnet_jax.errors import UserError

Color = tuple[int, int, int]
COLUMNS = {  # {column: its names in headers}
    "name": "name class class_name classname label label_name category title readable",
    "index": "index idx id label_id labelid class_id classid class_index train_id trainid value pixel_value",
    "red": "red r",
    "green": "green g",
    "blue": "blue b",
    "ignored": "ignored ignore",
}
_INDEX = re.compile(r"(\d+)(?:\s*[:=.)]\s*|\s+)(?=\S)")  # a label before a name
_COLOR_FIRST = re.compile(r"(\d+)[\s,;]+(\d+)[\s,;]+(\d+)[\s,;]+([^\d\s].*)")
_NO_NAME = re.compile(r"[{}<>|=]|:\s|\s#|(\s+[\d.]+){2}\s*$")  # YAML, JSON, XML, or numbers that are not a color
EXPECTED = "expected one class per line, as `name` or `name R G B`; put it in quotes if it is meant as a name"
_COLUMN = {word: column for column, words in COLUMNS.items() for word in words.split()}


class Row(NamedTuple):
    """One class of a list."""

    line: int  # from 1
    name: str
    label: int | None = None
    color: Color | None = None
    ignored: bool = False


def parse(text: str, file: str) -> tuple[tuple[str, ...], dict[int, Color]]:
    """Returns the class names in label order, and {label: color} of the classes with a color.

    Raises:
      UserError: names the file and the first line that is ambiguous or cannot be parsed.
    """
    rows = [row for row in read_rows(text, file) if row.label != 255 and not row.ignored]
    if not rows:
        raise UserError(f"{file}: contains no classes; expected one per line, as `name` or `name R G B`")
    ordered = _sorted_by_label(rows, file) if rows[0].label is not None else rows
    return tuple(row.name for row in ordered), {i: row.color for i, row in enumerate(ordered) if row.color}


def read_rows(text: str, file: str) -> list[Row]:
    """Returns the lines of a list in their order."""
    if file.endswith(".json"):
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UserError(f"{file}: is not JSON ({error})") from error
        return _find_rows(content) or _refuse(file, 1, "lists no classes")
    without_comments = [re.sub(r"^#.*|\s#(\s.*)?$", "", line.strip()) for line in text.removeprefix("\ufeff").splitlines()]
    lines = [(number, line.strip()) for number, line in enumerate(without_comments, 1) if line.strip()]
    cvat = [re.fullmatch(r"([^:]+):(\d+),(\d+),(\d+):[^:]*:[^:]*", line) for _, line in lines]
    if lines and all(cvat):
        found = [(n, match.groups()) for (n, _), match in zip(lines, cvat, strict=True) if match]
        return [Row(number, name, None, _color(color, number, file)) for number, (name, *color) in found]
    colored = [_COLOR_FIRST.fullmatch(line) for _, line in lines]
    if all(colored):
        return [_row_by_color(number, found, file) for (number, _), found in zip(lines, colored, strict=True) if found]
    return _rows(lines, file)


def _find_rows(content: Any) -> list[Row]:
    """Returns the first list of classes in the content of a JSON file; [] without one."""
    items: list[tuple[Any, ...]] = []  # name, label, color
    if isinstance(content, list):
        for item in content:
            named = item if isinstance(item, dict) else {"name": item}
            fields = {_COLUMN.get(key.lower(), key.lower()): value for key, value in named.items()}
            items.append((fields.get("name"), fields.get("index"), fields.get("color")))
    elif isinstance(content, dict):
        for key, value in content.items():
            is_name, label = isinstance(value, str), key if key.isdecimal() else None
            items.append((value if is_name else key, label if is_name else value, key if is_name else value))
    rows = [
        Row(1, name, int(label) if re.fullmatch(r"\d+", str(label)) else None, _json_color(color))
        for name, label, color in items
        if isinstance(name, str)
    ]
    known = isinstance(content, list) or all(row.label is not None or row.color for row in rows)
    if rows and len(rows) == len(items) and known:
        return rows
    inside = content.values() if isinstance(content, dict) else ()
    return next(filter(None, map(_find_rows, inside)), [])


def _json_color(value: Any) -> Color | None:
    if isinstance(value, str):
        return _from_hex(value)
    is_color = isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 <= v < 256 for v in value)
    return tuple(value) if is_color else None


def _rows(lines: list[tuple[int, str]], file: str) -> list[Row]:
    separator = next((s for s in "\t;," if all(s in line for _, line in lines)), "")
    tables = [(number, _fields(line, separator)) for number, line in lines]
    header = [_COLUMN.get(field.lower().replace(" ", "_")) for field in tables[0][1]]
    if len(header) == 1 and header[0] not in (None, "ignored") and len(tables) > 1:
        _refuse(file, tables[0][0], f"{tables[0][1][0]!r} looks like a header; remove it, or rename the class")
    if "name" in header and None not in header and len(set(header)) == len(header):
        return [_row_by_header(header, number, fields, file) for number, fields in tables[1:]]
    if separator and len(header) > 1 and any(header) and not any(field.isdecimal() for field in tables[0][1]):
        _refuse(file, tables[0][0], f"the header has columns other than {', '.join(COLUMNS)}; rename them, or remove the line")
    if separator:  # turn "0,sky" into "0 sky"
        tables = [(n, [" ".join(f[:2]), *f[2:]] if f[1:] and f[0].isdecimal() else f) for n, f in tables]
    indexed = all(_INDEX.match(fields[0]) for _, fields in tables)
    columns = [re.fullmatch(r"(.*\D)\s+[\d.]+", fields[0]) for _, fields in tables] if not separator else []
    if len(columns) > 1 and len({column and column[1] for column in columns} - {None}) == len(columns):
        _refuse(file, tables[0][0], f"{tables[0][1][0]!r} ends in a number that is not part of a color; {EXPECTED}")
    rows = [_row(number, fields, indexed, separator, file) for number, fields in tables]
    return rows[rows[0].name == "__ignore__" :] if rows and not indexed else rows  # labelme's first line has no value


def _fields(line: str, separator: str) -> list[str]:
    """Splits a line into fields; without a separator, into a name, which may contain spaces, and a color, or into a header."""
    if separator:
        fields = [field.strip() for field in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]
        while fields[1:] and not fields[-1]:
            fields.pop()
        return fields
    line = line.rstrip(",;")
    words = line.split()
    if words and all(word.lower() in _COLUMN for word in words):
        return words
    color = re.search(r"\s+(?:\d+\s+\d+\s+\d+|#[0-9a-fA-F]{6})$", line)
    return [line[: color.start()], *color[0].split()] if color else [line]


def _row(number: int, fields: list[str], indexed: bool, separator: str, file: str) -> Row:
    name, *color = fields
    label = None
    if indexed and (found := _INDEX.match(name)):
        label, name = int(found[1]), name[found.end() :]
    if re.search(r"^['\"].*['\"]$", name):
        name = name[1:-1]
    elif _NO_NAME.search(name if color else f"{name} "):  # before a color, a name may end in a colon
        _refuse(file, number, f"{name!r} is not just a name; {EXPECTED}")
    name = name.rstrip(": ")
    if re.fullmatch(r"(\d+\s+)*\d*", name) and (separator or not name.isdecimal()):
        _refuse(file, number, "has no name")
    if name.startswith("- ") or name.count('"') % 2 or name.count("[") != name.count("]"):
        _refuse(file, number, f"{name!r} is not just a name; {EXPECTED}")
    return Row(number, name, label, _color(color, number, file) if color else None)


def _row_by_color(number: int, found: re.Match[str], file: str) -> Row:
    *color, name = found.groups()
    separator = next((s for s in ",;" if s in found.string[: found.start(4)]), "")
    fields = _fields(name, separator)
    if len(fields) > 1:
        _refuse(file, number, f"{name!r} is not just a name; {EXPECTED}")
    return _row(number, [*fields, *color], False, separator, file)


def _row_by_header(header: list[str | None], number: int, fields: list[str], file: str) -> Row:
    if len(fields) != len(header):
        _refuse(file, number, f"has {len(fields)} fields, but the header has {len(header)}")
    found = dict(zip(header, fields, strict=True))
    color = [found[key] for key in ("red", "green", "blue") if key in found]
    index = found.get("index")
    if not found["name"]:
        _refuse(file, number, "has no name")
    if index is not None and not index.isdecimal():
        _refuse(file, number, f"{index!r} is not a label value")
    ignored = found.get("ignored", "").lower() in ("1", "true", "yes", "ignored", "x")
    return Row(number, found["name"], int(index) if index else None, _color(color, number, file) if color else None, ignored)


def _color(values: list[str], number: int, file: str) -> Color:
    if len(values) == 1 and (color := _from_hex(values[0])):
        return color
    if len(values) != 3 or not all(value.isdecimal() and int(value) < 256 for value in values):
        _refuse(file, number, f"{', '.join(values)} after the name is not a color; expected R, G, B, each from 0 to 255")
    return int(values[0]), int(values[1]), int(values[2])


def _from_hex(text: str) -> Color | None:
    return tuple(bytes.fromhex(text[1:])) if re.fullmatch(r"#[0-9a-fA-F]{6}", text) else None  # type: ignore[return-value]


def _sorted_by_label(rows: list[Row], file: str) -> list[Row]:
    ordered = sorted(rows, key=lambda row: row.label or 0)
    for expected, (number, name, label, *_) in enumerate(ordered):
        if label != expected:
            _refuse(file, number, f"{name!r} has label {label}, expected {expected}; labels count from 0 without gaps")
    return ordered


def _refuse(file: str, line: int, why: str) -> NoReturn:
    raise UserError(f"{file}, line {line}: {why}")
