"""The files of dataset.name="folder": found by patterns of their names; divided into splits by folders, lists or a fraction."""

import collections
import csv
import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf
from ml_collections import ConfigDict

from pspnet_jax import image_files, polygons
from pspnet_jax.data import listing
from pspnet_jax.data.names import check_partners
from pspnet_jax.errors import MissingFileError, UserError

# Extensions of labels, if there are no .png files.
LABELS = (".tif", ".tiff", ".gif", ".bmp", ".ppm", ".pgm", ".jpg", ".jpeg", ".npy", ".mat")
COLUMNS = {  # {column: its names in the header of a list}
    "image": "image img image_path image_file image_id image_name file_name filename file path name",
    "label": "label mask label_path mask_path label_file mask_file annotation target",
    "split": "split set subset fold partition",
}
Files = tuple[str, str, str]  # name, image file, label file
_COLUMN = {word: column for column, words in COLUMNS.items() for word in words.split()}


def find(dataset: ConfigDict, root: str, split: str) -> list[Files]:
    """Returns the files of a split, as `match` does.

    Args:
      dataset: config.dataset; its fields images, labels, split_file, split_fraction and split_seed are used.
      root: its directory.
      split: replaces {split} in patterns; otherwise "train" or "val", or a split in the list.

    Raises:
      UserError: a directory or list is missing or empty, names are ambiguous, or nothing tells the splits apart.
    """
    file = f"{root}/{dataset.split_file.replace('{split}', split)}"
    listed = _listed(dataset, root, file, split) if dataset.split_file else []
    if listed and listed[0][1]:
        return sorted((os.path.splitext(image)[0], f"{root}/{image}", f"{root}/{label}") for image, label in listed)
    by_fraction = not listed and "{split}" not in dataset.images and not _splits_coco(dataset.labels)
    if by_fraction and not (dataset.split_fraction and split in ("train", "val")):
        raise UserError(
            f"dataset.images={dataset.images!r} has no {{split}}, so every split would have the same images; add it, or set "
            "dataset.split_file, or dataset.split_fraction for the splits train and val"
        )
    skip = dataset.on_error == "skip"
    found = match(root, dataset.images, dataset.labels, split, skip)
    if by_fraction:
        chosen = [f for f in found if (position(dataset.split_seed, f[0]) < dataset.split_fraction) == (split == "val")]
        if not chosen:
            raise UserError(
                f"dataset.split_fraction={dataset.split_fraction}: none of the {len(found)} images of {root} is in split "
                f"{split!r}; change the fraction or dataset.split_seed"
            )
        return chosen
    if not listed:
        return found
    known = match(root, dataset.images, dataset.labels, split) if skip else found
    paths = {name: image[len(root) + 1 :] for name, image, _ in known}
    names = _names([image for image, _ in listed], paths, file)
    return [files for files in found if files[0] in names]


def position(seed: int, name: str) -> float:
    """Returns a number from 0 to 1 that depends only on the seed and the name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) / 2**64


def match(root: str, images: str, labels: str, split: str, skip: bool = False) -> list[Files]:
    """Returns the files that match two patterns, sorted by name, and warns about images that match neither.

    The label is "" if the labels' directory does not exist. If one file of a pair is missing, its path is a guess.

    Args:
      root: directory of the patterns.
      images, labels: paths with {name} and possibly {split}; "*" stands for any part of a file's or directory's name, {tail}
        for the rest of the name after a word that does not belong to it, see `listing.name_of`.
      split: replaces {split}.
      skip: whether to leave out files without a partner, with a warning.
    """
    directory, found, others = _side(root, images, split, (image_files.SUFFIXES,))
    kinds = ((".json",),) if labels.lower().endswith(".json") else ((".png",), LABELS)
    label_directory, _ = _compile(root, labels, split)
    if polygons.is_coco(labels):
        label_files, more = polygons.listed(f"{root}/{labels.replace('{split}', split)}", found), list[str]()
        if "{split}" not in images and _splits_coco(labels):
            found = {name: path for name, path in found.items() if name in label_files}
    elif not tf.io.gfile.isdir(label_directory):
        return [(name, found[name], "") for name in sorted(found)]
    else:
        label_directory, label_files, more = _side(root, labels, split, kinds)
        found, label_files = _more_specific(found, label_files), _more_specific(label_files, found)
        check_partners(found, label_files, label_directory)
    used = {*found.values(), *label_files.values()}
    for where, unused, kind in ((directory, others, image_files.SUFFIXES), (label_directory, more, kinds[0])):
        neither = [path for path in unused if path not in used]
        named = any(path.lower().endswith(tuple(kind)) for path in neither)
        why = "match neither dataset.images nor dataset.labels" if named else f"are not {', '.join(kind)} files"
        listing.warn_of_others(where, neither, why)
        used |= {*neither}
    alone = found.keys() ^ label_files.keys() if skip else set[str]()
    partners = [(found | label_files)[name] for name in sorted(alone)]
    listing.warn_of_others(directory, partners, "have no label, or no image, and dataset.on_error is 'skip'")
    image, label = (re.sub(r"\*$", kind, p.replace("{split}", split)) for p, kind in ((images, "jpg"), (labels, "png")))

    def guess(pattern: str, name: str) -> str:
        return f"{root}/{pattern.replace('{name}', name).replace('{tail}', '*')}"

    return [
        (name, found.get(name, guess(image, name)), label_files.get(name, guess(label, name)))
        for name in sorted((found.keys() | label_files.keys()) - alone)
    ]


def _splits_coco(labels: str) -> bool:
    """Returns whether each split has a COCO file, which lists its images."""
    return polygons.is_coco(labels) and "{split}" in labels


def _side(root: str, pattern: str, split: str, kinds: Sequence[Sequence[str]]) -> tuple[str, dict[str, str], list[str]]:
    """Returns a pattern's directory, {name: path} of the files with the first kinds of extension found, and other images."""
    directory, expression = _compile(root, pattern, split)
    for extensions in kinds:
        found, others = listing.find(directory, extensions, expression)
        if found:
            return directory, found, others
    expected = "" if pattern.endswith("{name}.*") and not others else f" that match {pattern}"
    extensions = ", ".join(extension for group in kinds for extension in group)
    raise MissingFileError(f"{directory}: contains no {extensions} files{expected}")


def _more_specific(files: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    """Drops files that match the other pattern with a shorter name: 1_mask.png matches {name}.png and {name}_mask.png."""
    other_names = {path: name for name, path in others.items()}
    return {name: path for name, path in files.items() if len(name) <= len(other_names.get(path, name))}


def _compile(root: str, pattern: str, split: str) -> tuple[str, re.Pattern[str]]:
    """Returns the directory before the first part of a pattern that varies, and the rest as a regular expression."""
    parts = pattern.replace("{split}", split).split("/")
    fixed = list(itertools.takewhile(lambda part: "{name}" not in part and "*" not in part, parts))
    rest = re.escape(unicodedata.normalize("NFC", "/".join(parts[len(fixed) :])))
    return "/".join([root, *fixed]), re.compile(listing.with_names(rest), re.IGNORECASE)


class Row(NamedTuple):
    """An entry of a list: an image, its label and its split, each possibly ""."""

    image: str = ""
    label: str = ""
    split: str = ""


def parse_list(lines: Sequence[str]) -> tuple[list[Row], Collection[str]]:
    """Returns the entries of a list, and the columns that it has; none if it is another kind of table.

    A list is a CSV (with "," or ";" or tabs) whose header names an image column (see `COLUMNS`), or has in each line one name
    or path, or the paths of an image and its label.
    """
    lines = [line.replace("\\", "/") for line in lines if line.strip()]  # paths may be those of Windows
    first = lines[0] if lines else ""
    separator = next((s for s in ",;\t" if s in first), ",")
    header = [_COLUMN.get(field.strip().strip('"').lower(), "") for field in first.split(separator)]
    if "image" in header:
        try:
            table = [list(map(str.strip, fields)) for fields in csv.reader(lines[1:], delimiter=separator)]
        except csv.Error:
            return [], ()
        columns = {role: _column_of(role, header, table) for role in {*header} - {""}}
        if "label" in columns and not _names_file(table, columns["label"]):
            del columns["label"]  # a diagnosis, say
        return [Row(**{role: fields[k] for role, k in columns.items() if k < len(fields)}) for fields in table], header
    pairs = [re.fullmatch(r"\s*(\S.*?\.\w{2,5})[\s,;]+(\S.*\.\w{2,5})\s*", line) for line in lines]
    return [Row(*pair.groups()) if pair else Row(line.strip()) for pair, line in zip(pairs, lines, strict=True)], ("image",)


def _column_of(role: str, header: Sequence[str], table: Sequence[Sequence[str]]) -> int:
    """Returns the first of a role's columns that has the names of files in its first row; of all, if none has."""
    columns = [k for k, other in enumerate(header) if other == role]
    return next((k for k in columns if _names_file(table, k)), columns[0])


def _names_file(table: Sequence[Sequence[str]], column: int) -> bool:
    return bool(table) and column < len(table[0]) and bool(re.search(r"\.\w+$", table[0][column]))


def _listed(dataset: ConfigDict, root: str, file: str, split: str) -> list[tuple[str, str]]:
    """Returns the image and the label, or "", in each entry of a split's list."""
    rows, columns = parse_list(listing.read_lines(file))
    if not columns:
        raise UserError(f"{file}: cannot be read as a table; correct its quotes")
    if "split" not in columns and "{split}" not in dataset.split_file:
        raise UserError(f"{file}: names no splits; put {{split}} into dataset.split_file, or add a column named split")
    found = [row for row in rows if row.split == split] if "split" in columns else rows
    if not found:
        known = ", ".join(sorted({row.split for row in rows}))
        raise UserError(f"{file}: lists no image of split {split!r}" + (f"; its splits are {known}" if known else ""))
    for column in ("image", "label"):
        missing = sum(not getattr(row, column) for row in found)
        if missing and (missing < len(found) or column == "image"):
            raise UserError(f"{file}: {missing} of {len(found)} lines of split {split!r} have no {column}; complete them")

    folder = list_folder(file[len(root) + 1 :], found[0].image, lambda path: tf.io.gfile.exists(f"{root}/{path}"))

    def below(path: str) -> str:
        return path.removeprefix(f"{root}/") if path.startswith(f"{root}/") else folder + path.lstrip("./")

    return [(below(row.image), below(row.label)) for row in found]


def list_folder(file: str, entry: str, exists: Callable[[str], bool]) -> str:
    """Returns the folder that the paths in a list are relative to, "" or with a "/" at its end: the root or one above the list.

    Args:
      file: path of the list below the root.
      entry: one of its paths.
      exists: tells whether there is a file of a path below the root.
    """
    parts = file.split("/")[:-1]
    folders = ["", *("/".join(parts[:end]) + "/" for end in range(1, len(parts) + 1))]
    return next((folder for folder in folders if exists(folder + entry.lstrip("./"))), "")


def forms(path: str) -> set[str]:
    """Returns the forms in which a list may give a path: with or without folders and extension."""
    whole = {path, os.path.splitext(path)[0]}
    return whole | {os.path.basename(form) for form in whole}


def _names(listed: Sequence[str], images: Mapping[str, str], file: str) -> set[str]:
    """Returns the names of listed images, given by name, path or the end of it, with or without extension, even the label's."""
    known: dict[str, str] = {}
    for name, path in images.items():
        for form in forms(path):
            known[form] = "" if form in known else name  # "": ambiguous
    known |= {name: name for name in images}
    given = [(text, os.path.basename(text), text.split()[0], os.path.splitext(os.path.basename(text))[0]) for text in listed]
    names = [next(filter(None, map(known.get, of_entry)), "") for of_entry in given]
    if missing := [text for text, name in zip(listed, names, strict=True) if not name]:
        raise UserError(
            f"{file}: {len(missing):,} of {len(listed):,} entries name none of the {len(images):,} images that match "
            f"dataset.images, the first is {missing[0]!r}; correct the list or the pattern"
        )
    name, number = collections.Counter(names).most_common(1)[0]
    if number > 1:
        same = [text for text, found in zip(listed, names, strict=True) if found == name][:2]
        raise UserError(f"{file}: {same[0]!r} and {same[1]!r} both stand for the image {images[name]}; list each image once")
    return set(names)
