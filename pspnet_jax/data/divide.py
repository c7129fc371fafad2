"""Divides the pairs of a folder into training and validation: by the names of folders, by lists, or by a fraction."""

import collections
import os
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from pspnet_jax.data import discover, folders

FRACTION = 0.2  # of the pairs, or of parallel folders, for validation
MOST = 0.9  # share of a list's lines that must name images
GUESS = "GUESS: a fifth of the pairs, chosen by their names, for validation"


class Division(NamedTuple):
    """Values for fields of a recipe, and how they were found. `val_split` is for config.eval.split."""

    images: str
    labels: str
    train_split: str = "train"
    val_split: str = "val"
    split_file: str = ""
    split_fraction: float = 0.0
    reason: str = ""


def divide(rule: discover.Rule, paths: Collection[str], lists: Mapping[str, str]) -> Division:
    """Returns the division of the pairs of a rule.

    Args:
      rule: one of `discover.rules(paths)`.
      paths: of images and possible labels.
      lists: {path: content} of text files.
    """
    images, labels = (discover.match(pattern, paths, rule.splits) for pattern in (rule.images, rule.labels))
    images = {key: path for key, path in images.items() if path not in {*labels.values()}}
    paired = [path for key, path in images.items() if key in labels]
    division = Division(_with_extension(rule.images, paired), _with_extension(rule.labels, labels.values()))
    if splits := choose_splits(rule.splits):
        return division._replace(train_split=splits[0], val_split=splits[1], reason="the names of folders")
    if len(rule.splits) > 1:
        folders = sorted(rule.splits)
        held_out = folders[:: round(1 / FRACTION)]
        train = "+".join(folder for folder in folders if folder not in held_out)
        reason = "GUESS: every fifth folder for validation"
        return division._replace(train_split=train, val_split="+".join(held_out), reason=reason)
    (only,) = rule.splits
    division = division._replace(
        images=division.images.replace("{split}", only), labels=division.labels.replace("{split}", only)
    )
    if found := find_lists({name: path for (_, name), path in images.items()}, lists):
        return Division(division.images, division.labels, *found)
    return division._replace(split_fraction=FRACTION, reason=GUESS)


def choose_splits(splits: Iterable[str]) -> tuple[str, str] | None:
    """Returns the splits for training and evaluation, "a+b" if folders share a name; None if there is not one for each."""
    named = collections.defaultdict(list)
    for split in sorted(splits):
        named[discover.use_of(split), discover.split_of(split)].append(split)
    chosen = [
        next(("+".join(named[key]) for use in uses for key in sorted(named, key=lambda key: len(key[1])) if key[0] == use), "")
        for uses in (("train",), ("val", "test"))
    ]
    return (chosen[0], chosen[1]) if all(chosen) else None


def find_lists(images: Mapping[str, str], lists: Mapping[str, str]) -> tuple[str, str, str, float, str] | None:
    """Returns the fields of `Division` from train_split on, by the lists that name most images; None if there are none.

    Args:
      images: {name: path}.
      lists: {path: content}.
    """
    known = {form for item in images.items() for text in item for form in _forms(text)}
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for path, text in lists.items():
        rows, columns = _rows(text)
        listed = [row for row in rows if known.intersection(_forms(row.image))]
        folder, name = os.path.split(path)
        if not listed or len(listed) < MOST * len(rows):
            continue
        if "split" in columns:
            found[path].update(row.split for row in listed)
        elif split := discover.split_of(os.path.splitext(name)[0]):
            found[os.path.join(folder, name.replace(split, "{split}", 1))][split] = len(listed)
    for file, counts in sorted(found.items(), key=lambda item: (-item[1].total(), len(item[0]))):
        if splits := choose_splits(counts):
            return *splits, file, 0.0, f"the lists {file}"
    return None


def lists_pairs(text: str, paths: Collection[str]) -> bool:
    """Returns whether every entry of a list is an image and its label, by their paths."""
    rows, _ = _rows(text)
    return bool(rows) and all(side.removeprefix("./") in paths for row in rows for side in (row.image, row.label))


def _rows(text: str) -> tuple[list[folders.Row], Collection[str]]:
    return folders.parse_list([line for line in text.splitlines() if line.strip()])


def _forms(text: str) -> set[str]:
    """Returns the forms in which a list may give a path: with or without folders, extension and a number after it."""
    bases = {path.removeprefix("./") for path in (text, *text.split()[:1])}
    bases |= {os.path.splitext(base)[0] for base in bases}
    return bases | {os.path.basename(base) for base in bases}


def _with_extension(pattern: str, paths: Collection[str]) -> str:
    """Returns a pattern that ends with the extension if all files have the same, so that it describes no others."""
    extensions = {os.path.splitext(path)[1] for path in paths}
    return pattern.removesuffix(".*") + extensions.pop() if pattern.endswith(".*") and len(extensions) == 1 else pattern
