"""Finds the pairs of images and labels in a folder from the names of its files, as patterns for config.dataset.

Two files may be a pair if their paths are equal except for one run of folders, such as images/ and masks/, and for a prefix and
a suffix of their names, such as "_sat" and "_mask". All rules that fit are collected, and ranked by their words and pairs.
"""

import collections
import functools
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pspnet_jax.data import listing

CLOSE = 100  # more folders that differ in the same place are not compared with each other
COMMON = 0.1  # share of a folder's files that an affix has
_WORDS = "trainval|training|train|validation|valid|val|testing|test|eval|dev"
_SPLIT = re.compile(  # train, train_images, train2017, TrainImages, trainannot, imagesTr
    rf"(?<![a-zA-Z])(?i:{_WORDS})(?![a-zA-Z])|^(?i:{_WORDS})(?=[A-Z]|(?i:annot|label|mask|im|gt|seg))"
    r"|(?:(?<=[a-z])|^)(?:Tr|Ts|Va|Train|Val|Test)$"
)
_LABELS = (  # how much a word tells that files are labels
    (r"train_?ids?", 5),
    (r"truth|manual|label|semantic|(?<![a-z])gt", 4),
    (r"mask|seg|(?<![a-z])ann|target|class|lbl|pars", 3),
    (r"(?<![a-z0-9])[mly]$", 1),
)
_IMAGES = re.compile(r"im(age|g)|jpe?g|photo|pic|rgb|(?<![a-z])sat|input|left|frame|ortho|raw|orig")
_NEITHER = re.compile(
    r"colou?r|inst|panop|object|(?<![a-z])d[est]m(?![a-z])|depth|dispar|edge|bound|contour|(?<![a-z])vis|viz|overlay|weight|poly"
    "|pred|conf|thumb|preview"
)


_PREFIXES = (r"[A-Za-z{}]+([_\-. ]+|(?=[\d(]))", r"[A-Za-z{}][A-Za-z{}_\-. ]*(?=[\d(])")  # a word, or all before a number
# "_mask", the "L" of "01L", and "_0000", the first channel of an image for nnU-Net
_SUFFIX = re.compile(r"[_\-. ]+(?=[^_\-. ]*[A-Za-z])|(?<=\d)(?=[A-Za-z]+$)|_(?=0000$)")


class File(NamedTuple):
    """A file: the components of its folder and its name, where {split} replaces `split` in the folder, or else in the name."""

    folder: tuple[str, ...]
    split: str
    stem: str
    extension: str
    path: str


class Rule(NamedTuple):
    """Patterns of images and labels, in the form of config.dataset.images and labels.

    Attributes:
      images: pattern of the images.
      labels: pattern of the labels.
      splits: what {split} stands for; folders with images and labels of their own if they do not name a split.
      pairs: number of pairs.
      example: the first image and its label.
      rank: likelihood, on an arbitrary scale.
    """

    images: str
    labels: str
    splits: frozenset[str]
    pairs: int
    example: tuple[str, str]
    rank: float


def rules(paths: Collection[str]) -> list[Rule]:
    """Returns the rules by which files of a folder can be pairs, best first, given the paths of images and possible labels."""
    above = os.path.commonpath([os.path.dirname(path) for path in paths] or [""])
    common = len(above.split("/")) if above else 0
    found = [*_rules([_file(path, common) for path in paths], False), *_rules([_file(path) for path in paths], True)]
    found = [rule for rule in found if rule.rank > 0] or found
    best: dict[tuple[str, str], Rule] = {}
    for rule in sorted(found, key=lambda r: (-r.rank, any("/" in s for s in r.splits), len(r.images + r.labels), r)):
        best.setdefault(rule.example, rule)
    return list(best.values())


def match(pattern: str, paths: Iterable[str], splits: Iterable[str]) -> dict[tuple[str, str], str]:
    """Returns {(split, name): path} of the paths that have a pattern, in which {split} stands for one of `splits`."""
    either = "|".join(map(re.escape, sorted(splits, key=len, reverse=True)))
    regex = re.escape(pattern).replace(r"\{split\}", f"(?P<split>{either})", 1).replace(r"\{split\}", "(?P=split)")
    matches = [(re.fullmatch(listing.with_names(regex), path), path) for path in paths]
    return {(found.groupdict().get("split", ""), listing.name_of(found)): path for found, path in matches if found}


def split_of(path: str) -> str:
    """Returns what in a path names a split, such as "val" or "Tr"; "" if nothing does."""
    found = filter(None, map(_SPLIT.search, path.split("/")))
    return next((match[0] for match in found), "")


@functools.lru_cache
def use_of(split: str) -> str:
    """Returns what the split named in a path is for: train, val, test, or "" if no split is named."""
    uses = {"tr": "train", "va": "val", "ev": "val", "de": "val", "te": "test", "ts": "test"}
    return uses.get(split_of(split).lower()[:2], "")


def unlikely_images(folder: str) -> tuple[bool, bool, str]:
    """Returns a key that sorts folders by how likely they are to hold images."""
    return bool(_NEITHER.search(folder.lower())), not _IMAGES.search(folder.lower()), folder


def _file(path: str, common: int | None = None) -> File:
    """Returns a file of a path; its split is looked for below the folders that all files have in common, if these are given."""
    *folder, name = path.split("/")
    split = "" if common is None else split_of("/".join(folder[common:]))
    below = [re.sub(_SPLIT, lambda found: "{split}" if found[0] == split else found[0], part) for part in folder[common:]]
    folder = [*folder[:common], *below] if split else folder
    stem, extension = os.path.splitext(name)
    if common is not None and not split and (first := _SPLIT.match(stem)):  # train_1.png
        split, stem = first[0], "{split}" + stem[first.end() :]
    return File(tuple(folder), split, stem, extension, path)


def _rules(files: Sequence[File], parallel: bool) -> Iterator[Rule]:
    """Yields all rules; with `parallel`, those that differ only in the folders above images/ and labels/ also as one."""
    folders, names = collections.defaultdict(list), collections.defaultdict(set)
    for file in files:
        folders[file.folder].append((file, cuts := list(_cuts(file))))
        for affixes, name in cuts:
            names[affixes].add(name)
    indices = {folder: _index(members, names) for folder, members in folders.items()}
    found: dict = collections.defaultdict(lambda: collections.defaultdict(list))
    for one, other, above, x, y, below in _neighbors(sorted(folders)):
        tail = below[: max((i for i, part in enumerate(below, 1) if "{split}" in part), default=0)]
        for (a, b), pairs in _pairs(indices[one], indices[other]).items():
            found[x, y, tail, a, b][above].append((below[len(tail) :], pairs))
    for key, parts in found.items():
        for above, part in parts.items():
            yield from _both_ways(above, key, part)
        if parallel and len(parts) > 1 and all(parts):
            joined = [
                (rest, [("/".join(above), *p[1:]) for p in pairs]) for above, part in parts.items() for rest, pairs in part
            ]
            yield from _both_ways(("{split}",), key, joined)


def _neighbors(folders: Sequence[tuple[str, ...]]) -> Iterator[tuple]:
    """Yields each (folder, folder, above, x, y, below), where the folders are above/x/below and above/y/below."""
    places = collections.defaultdict(list)
    for folder in folders:
        yield folder, folder, (), (), (), folder
        for i, j in itertools.combinations_with_replacement(range(len(folder) + 1), 2):
            if j - i <= 3:
                places[folder[:i], folder[j:]].append((folder[i:j], folder))
    for (above, below), members in places.items():
        for (x, one), (y, other) in itertools.combinations(sorted(members) if len(members) <= CLOSE else (), 2):
            crosses = {"", use_of("/".join(one)), use_of("/".join(other))}
            if one != other and len(crosses) < 3 and not (x and y and (x[0] == y[0] or x[-1] == y[-1])):
                yield one, other, above, x, y, below


def _index(files: Sequence[tuple[File, list]], names: Mapping[tuple, Collection[str]]) -> dict[str, list[tuple[tuple, File]]]:
    """Returns {name: its affixes and files} for every common prefix and suffix that may not belong to the name.

    Args:
      files: those of a folder, each with its `_cuts`.
      names: all names that have a prefix and suffix, in any folder.
    """
    common = collections.Counter(affixes for _, cuts in files for affixes, _ in cuts)
    index = collections.defaultdict(list)
    for file, cuts in files:
        for affixes, name in cuts:
            is_number = len(names[affixes]) == 1 and len(files) > 2 and re.search(r"\d", "".join(affixes))
            if common[affixes] >= COMMON * len(files) and not is_number:
                index[name].append((affixes, file))
    return index


def _cuts(file: File) -> Iterator[tuple[tuple[str, str], str]]:
    """Yields ((prefix, suffix), name): the prefix is one word or all before a number, the suffix a separator and words."""
    stem = file.stem
    ends = [len(stem), *(found.start() for found in re.finditer(_SUFFIX, stem))]
    if re.fullmatch(r"[A-Za-z_\- ]+", stem):
        yield (f"/{stem}", ""), ""  # the name is that of its folder
    for word in re.finditer(r"[_\-. ]+[A-Za-z]+(?=[_\-. ])", stem):  # inside the name
        yield (f"~{word[0]}", ""), stem[: word.start()] + stem[word.end() :]
    prefixes = {0 if not stem.startswith("{split}") else len("{split}")}
    prefixes |= {found.end() for regex in _PREFIXES if (found := re.match(regex, stem))}
    for start, end in itertools.product(prefixes, ends):
        if start < end:
            suffix = stem[end:].replace(file.split, "{split}") if file.split else stem[end:]
            yield (stem[:start], suffix), stem[start:end]


def _pairs(index: dict, other: dict) -> dict[tuple, list[tuple[str, str, str]]]:
    """Returns {(affixes of one, affixes of the other): the split and the paths of each pair}; affixes include ".*"."""
    found = collections.defaultdict(list)
    for name in index.keys() & other.keys() - ({""} if index is not other else set()):
        for (a, file), (b, partner) in itertools.product(index[name], other[name]):
            ends = [".json" if f.extension == ".json" else ".*" for f in (file, partner)]
            if file.folder == partner.folder:
                if (a, file.extension) >= (b, partner.extension):
                    continue  # each pair once
                ends = [file.extension, partner.extension] if a == b else ends
            if file.split == partner.split or not (file.split and partner.split):
                found[(*a, ends[0]), (*b, ends[1])].append((file.split or partner.split, file.path, partner.path))
    return _of_longest_names(found, index is other)


def _of_longest_names(found: Mapping[tuple, list[tuple[str, str, str]]], both_ways: bool) -> dict[tuple, list]:
    """Drops pairs of which both files have a partner with shorter affixes: left_1 belongs to left_1, and not to right_1."""
    partners = {key: [set(side) for side in zip(*pairs, strict=True)][1:] for key, pairs in found.items()}
    if both_ways:
        partners |= {key[::-1]: sides[::-1] for key, sides in partners.items()}

    def shorter(affixes: tuple[str, str, str], others: tuple[str, str, str]) -> bool:
        return others[0].startswith(affixes[0]) and others[1].endswith(affixes[1])

    kept = {}
    for key, pairs in found.items():
        within = [s for k, s in partners.items() if key not in (k, k[::-1]) and all(map(shorter, k, key))]
        firsts, seconds = (set().union(*side) for side in zip(*within, strict=True)) if within else (set(), set())
        kept[key] = [pair for pair in pairs if pair[1] not in firsts or pair[2] not in seconds]
    return {key: pairs for key, pairs in kept.items() if pairs}


def _both_ways(above: tuple, key: tuple, parts: list) -> Iterator[Rule]:
    """Yields the rules in which files of x are the images and in which those of y are."""
    x, y, tail, a, b = key
    varying = list(zip(*(rest for rest, _ in parts), strict=False))
    rest = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, varying)]
    pairs = [pair for _, found in parts for pair in found]
    splits = frozenset(pair[0] for pair in pairs)
    if a[0].startswith("/") and len({rest for rest, _ in parts}) == 1:
        return  # the folder is no name
    sides = []
    for role, (prefix, suffix, extension) in ((x, a), (y, b)):
        name = {"/": f"{{name}}{prefix}", "~": f"{{name}}{prefix[1:]}{{tail}}"}.get(prefix[:1], f"{prefix}{{name}}{suffix}")
        sides.append(("/".join((*above, *role, *tail, *rest, name + extension)), f"{'/'.join(role)}/{prefix}{suffix}"))
    for order in (1, -1):
        (images, image_role), (labels, label_role) = sides[::order]
        if _strength(image_role) > 2 and not _IMAGES.search(image_role.lower()):
            continue  # these are labels, too
        example = min(pair[1:][::order] for pair in pairs)
        score = _score(image_role, label_role, example)
        rank = score * (len(pairs) * (1.5 if len(splits) > 1 else 1)) ** (0.1 if score > 0 else -0.1)
        yield Rule(images, labels, splits, len(pairs), example, rank)


def _strength(role: str) -> int:
    """Returns how much a role tells that its files are labels."""
    return max((points for words, points in _LABELS if re.search(words, role.lower())), default=0)


def _score(image: str, label: str, example: tuple[str, str]) -> float:
    """Returns how well the folders and affixes of images and labels, and an example of each, fit; 0 or less: rather not."""
    image, label = image.lower(), label.lower()
    kinds = [os.path.splitext(path)[1].lower() for path in example]
    if kinds[0] == ".json":
        return 0
    score = 0.5 + _strength(label) - _strength(image) + 0.1 * (len(label) > len(image))
    score += 2 * bool(_IMAGES.search(image)) - 2 * bool(_IMAGES.search(label))
    score -= 2 * bool(_NEITHER.search(image)) + 2 * bool(_NEITHER.search(label))
    return score + (kinds[0] in (".jpg", ".jpeg", ".jp2") and kinds[0] != kinds[1])
