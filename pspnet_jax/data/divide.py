"""Divides the pairs of a folder into training and validation: by the names of folders, by lists, or by a fraction."""

import collections
import os
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from pspnet_jax.data import discover, folders

FRACTION = 0.2  # of the pairs, or of parallel folders, for validation
MOST = 0.9  # share of a list's lines that must name images
GUESS_FOLDERS = "GUESS: every fifth folder for validation"
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

    def of_folder(self, folder: str) -> "Division":
        """Returns the division with patterns of one of its folders, or of several by a pattern."""
        return self._replace(images=self.images.replace("{split}", folder), labels=self.labels.replace("{split}", folder))


def divide(rule: discover.Rule, paths: Collection[str], lists: Mapping[str, str]) -> Division:
    """Returns the division of the pairs of one of `discover.rules(paths)`, given {path: content} of text files."""
    labels = discover.match(rule.labels, paths, rule.splits)
    pictures = [path for path in paths if not path.endswith(".json") and path not in {*labels.values()}]
    images = discover.match(rule.images, pictures, rule.splits)
    paired = [path for key, path in images.items() if key in labels]
    division = Division(_with_extension(rule.images, paired), _with_extension(rule.labels, labels.values()))
    if splits := choose_splits(rule.splits):
        named = "folders" if "{split}" in os.path.dirname(rule.images) else "files"
        return division._replace(train_split=splits[0], val_split=splits[1], reason=f"the names of {named}")
    names = {name: path for (_, name), path in images.items()}
    found = find_lists(names, lists, {*names.values()} - {*paired}) if len(names) == len(images) else None
    if len(rule.splits) > 1 and found and (parts := _in_common(rule.splits)):
        division = division.of_folder(parts)
        return Division(division.images, division.labels, *found)
    if len(rule.splits) > 1:
        folders = sorted(rule.splits)
        held_out = folders[:: round(1 / FRACTION)]
        train = "+".join(folder for folder in folders if folder not in held_out)
        return division._replace(train_split=train, val_split="+".join(held_out), reason=GUESS_FOLDERS)
    division = division.of_folder(*rule.splits)
    if found:
        return Division(division.images, division.labels, *found)
    return division._replace(split_fraction=FRACTION, reason=GUESS)


def only_folder(division: Division) -> Division:
    """Returns the division of a single one of the folders that a division by folders uses."""
    images, labels, *_ = division.of_folder(division.train_split.split("+")[0])
    return Division(images, labels, split_fraction=FRACTION, reason=f"{GUESS}; other folders have the same labels")


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


def _in_common(folders: Collection[str]) -> str:
    """Returns a pattern of folders, such as "a/*" for "a/b" and "a/c"; "" if some are deeper than others."""
    parts = [folder.split("/") for folder in folders]
    if len({*map(len, parts)}) > 1:
        return ""
    return "/".join(names[0] if len({*names}) == 1 else "*" for names in zip(*parts, strict=True))


def find_lists(
    images: Mapping[str, str], lists: Mapping[str, str], unlabeled: Collection[str] = ()
) -> tuple[str, str, str, float, str] | None:
    """Returns the fields of `Division` from train_split on, by the lists that name most images; None if there are none.

    Args:
      images: {name: path}.
      lists: {path: content}.
      unlabeled: paths of images without labels, which do not count.
    """
    known = {f: path not in unlabeled for name, path in images.items() for text in (name, path) for f in folders.forms(text)}
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    others = collections.Counter[str]()
    for path, text in lists.items():
        rows, columns = folders.parse_list(text.splitlines())
        texts = [{row.image, *row.image.split()[:1]} for row in rows]
        forms = [{form for text in of_row for form in folders.forms(text.removeprefix("./"))} for of_row in texts]
        listed = [row for row, of_row in zip(rows, forms, strict=True) if any(known.get(form) for form in of_row)]
        folder, name = os.path.split(path)
        if not listed or sum(not known.keys().isdisjoint(of_row) for of_row in forms) < MOST * len(rows):
            continue
        split = discover.split_of(os.path.splitext(name)[0])
        file = path if "split" in columns else os.path.join(folder, name.replace(split, "{split}", 1)) if split else ""
        found[file].update(row.split if "split" in columns else split for row in listed)
        others[file] += len(rows) - len(listed)
    found.pop("", None)
    for file, counts in sorted(found.items(), key=lambda item: (-item[1].total(), others[item[0]], len(item[0]))):
        if splits := choose_splits(counts):
            return *splits, file, 0.0, f"the lists {file}"
    return None


def lists_pairs(file: str, text: str, paths: Collection[str]) -> bool:
    """Returns whether every entry of a list is an image and its label, by their paths."""
    rows, _ = folders.parse_list(text.splitlines())
    folder = folders.list_folder(file, rows[0].image, lambda path: path in paths) if rows else ""
    return bool(rows) and all(folder + side.lstrip("./") in paths for row in rows for side in (row.image, row.label))


def _with_extension(pattern: str, paths: Collection[str]) -> str:
    """Returns a pattern that ends with the extension if all files have the same, so that it describes no others."""
    extensions = {os.path.splitext(path)[1] for path in paths}
    return pattern.removesuffix(".*") + extensions.pop() if pattern.endswith(".*") and len(extensions) == 1 else pattern
