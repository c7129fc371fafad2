"""What an unknown folder of images and labels holds: the first half of --mode check --input."""

import collections
import contextlib
import itertools
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import errors, image_files, polygons
from pspnet_jax.data import discover, divide, folders, foreign, label_values, layouts, listing
from pspnet_jax.errors import UserError

TEXTS = (".txt", ".csv", ".lst")  # and JSON files whose names say that they list classes
LONGEST = 2**24  # bytes of a list
FEW = 10  # more JSON files in a folder are those of single images
TRIED = 12  # rules whose labels are read
SEEDS = 20  # of dataset.split_seed


class Folder(NamedTuple):
    """The files of a folder.

    Attributes:
      root: its path.
      paths: of images and possible labels below it.
      texts: {path: content} of the text files.
      kinds: number of files of each extension.
    """

    root: str
    paths: Sequence[str]
    texts: Mapping[str, str]
    kinds: collections.Counter[str]


class Alternatives(NamedTuple):
    """Patterns of other images and of other labels."""

    images: Sequence[str] = ()
    labels: Sequence[str] = ()


class Found(NamedTuple):
    """A way to read a folder as a data set.

    Attributes:
      dataset: config.dataset, without the label map.
      val_split: config.eval.split.
      reason: how the splits were found.
      counts: {split: number of pairs} of the two splits.
      pairs: the files of all their images and labels.
      alone: images and labels of these splits without a partner.
      hints: what may be the reason.
      alternatives: other patterns that fit, of images with the same labels and of labels of the same images.
      values: what is in the labels.
    """

    dataset: ConfigDict
    val_split: str
    reason: str
    counts: Mapping[str, int]
    pairs: Sequence[tuple[str, str]]
    alone: Sequence[str]
    hints: Sequence[str]
    alternatives: Alternatives
    values: label_values.Values


def list_folder(root: str) -> Folder:
    """Lists a folder and reads its texts."""
    files = [(file[len(root) + 1 :], os.path.splitext(file)[1].lower()) for file in listing.walk(root)]
    files = [(path, suffix) for path, suffix in files if not path.startswith("__MACOSX/")]
    paths = sorted(path for path, suffix in files if suffix in {*image_files.SUFFIXES, *folders.LABELS, ".json"})
    jsons = collections.Counter(os.path.dirname(path) for path, suffix in files if suffix == ".json")
    texts = {}
    for path, suffix in files:
        is_list = suffix == ".json" and jsons[os.path.dirname(path)] <= FEW and label_values.LISTS.search(path)
        with contextlib.suppress(OSError):  # a broken link, or no permission
            if (suffix in TEXTS or is_list) and (file := epath.Path(root) / path).stat().length < LONGEST:
                texts[path] = file.read_bytes().decode("utf-8-sig", errors="replace")
    return Folder(root, paths, texts, collections.Counter(suffix for _, suffix in files))


def find(folder: Folder) -> Found:
    """Returns the best way to read a folder.

    Raises:
      UserError: there is none; says what was looked for, and what the folder holds.
    """
    reasons, refused = list[str](), ""
    with listing.without_warnings():  # of candidates; those of the best one come when it is opened as a data set
        for division, alternatives in _candidates(folder, reasons):
            try:
                found = _open(folder, division, alternatives)
            except UserError as error:
                reasons.append(str(error))
                refused = refused or f" ({error})" * bool(division.split_file)
                continue
            unused = [] if division.split_file else [path for path, text in folder.texts.items() if _names_split(path, text)]
            return found._replace(reason=f"{found.reason}; not used: {errors.listed(unused)}{refused}") if unused else found
    advice = foreign.advice(folder.root, folder.paths, folder.texts, [*folder.kinds])
    held = ", ".join(f"{number:,} {kind or 'without extension'}" for kind, number in folder.kinds.most_common(8)) or "no files"
    reasons += _padded(folder.paths)
    reasons = [advice] if advice else reasons[:1]
    raise UserError(
        f"{folder.root}: no pairs of images and labels found; looked for equal names in two folders (images/a.jpg and "
        "masks/a.png), for prefixes and suffixes (a_mask.png), for lists of images and labels, and for COCO and labelme files; "
        "it holds " + "; ".join((held, *reasons))
    )


def _names_split(file: str, text: str) -> bool:
    """Returns whether a text is probably a list of a split's images, by its name or a column of it."""
    return (
        bool(discover.use_of(os.path.splitext(os.path.basename(file))[0]))
        or "split" in folders.parse_list(text.splitlines())[1]
    )


def _padded(paths: Sequence[str]) -> Iterator[str]:
    """Yields a sentence for each two files whose names differ only in the zeros before a number."""
    first: dict[str, tuple[str, str]] = {}
    for path in paths:
        stem = os.path.splitext(os.path.basename(path))[0]
        other = first.setdefault(re.sub(r"(?<!\d)0+(?=\d)", "", stem), (stem, path))
        if other[0] != stem:
            yield f"{other[1]} and {path} differ in the zeros before a number: rename one side"


def _candidates(folder: Folder, reasons: list[str]) -> Iterator[tuple[divide.Division, Alternatives]]:
    """Yields ways to read the folder, best first; see `_coco`."""
    known = set(folder.paths)
    lists = {path: text for path, text in folder.texts.items() if divide.lists_pairs(path, text, known)}
    if found := divide.find_lists({path: path for path in known}, lists):
        unused, reason = configs.base_config().dataset, f"{found[-1]}, which name images and labels"
        yield divide.Division(unused.images, unused.labels, *found[:-1], reason), Alternatives()
    yield from _coco(folder, reasons)
    kept: list[tuple[discover.Rule, list[set[str]]]] = []
    for rule in discover.rules(folder.paths):
        variant = any(all(path in side for path, side in zip(rule.example, sides, strict=True)) for _, sides in kept)
        if not variant and len(kept) < TRIED:
            matched = (discover.match(pattern, folder.paths, rule.splits) for pattern in (rule.images, rule.labels))
            kept.append((rule, [set(side.values()) for side in matched]))
    divided = [(rule, divide.divide(rule, folder.paths, folder.texts)) for rule, _ in kept]
    used = {rule: set().union(*sides) for rule, sides in kept}
    for rule, division in sorted(divided, key=lambda d: -d[0].rank * (2 if d[1].split_file else 1)):
        yield division, _alternatives(rule, division, divided, used[rule])
    for rule, division in divided:
        if division.split_file:  # its list may be of another kind
            yield divide.divide(rule, folder.paths, {}), Alternatives()


def _alternatives(
    rule: discover.Rule,
    division: divide.Division,
    divided: Sequence[tuple[discover.Rule, divide.Division]],
    used: Collection[str],
) -> Alternatives:
    """Returns the other patterns for the labels of a rule's images, and for the images of its labels, most likely first.

    The rule uses some files itself.
    """
    sides: dict[str, int] = {division.images: -1, division.labels: -1}
    for other, one in sorted(divided, key=lambda d: -d[0].rank):
        for side, pattern in enumerate((one.images, one.labels)):
            if other.example[1 - side] == rule.example[1 - side] and other.example[side] not in used:
                sides.setdefault(pattern, side)
    return Alternatives(*([pattern for pattern, of in sides.items() if of == side] for side in (0, 1)))


def _coco(folder: Folder, reasons: list[str]) -> Iterator[tuple[divide.Division, Alternatives]]:
    """Yields the COCO files, those with most images first; adds to `reasons` why others cannot be used."""
    pictures, jsons = ([p for p in folder.paths if p.endswith(".json") == is_json] for is_json in (False, True))
    in_folder = collections.Counter(map(os.path.dirname, jsons))
    found: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    others: dict[tuple[str, str], list[str]] = {}
    for path in jsons:
        if in_folder[os.path.dirname(path)] > FEW:
            continue
        split = discover.split_of(path)
        images = [image for image in pictures if discover.split_of(os.path.dirname(image)) in ("", split)]
        try:
            places = _places(f"{folder.root}/{path}", images)
        except polygons.OtherJsonError:
            continue
        except UserError as error:
            reasons.append(str(error))
            continue
        if places:
            texts = [text.replace(split, "{split}") if split else text for text in (path, *places)]
            labels, first, *rest = [texts[0], *(os.path.join(text, "{name}.*") for text in texts[1:])]
            found[first, labels][split] += next(iter(places.values()))
            others[first, labels] = rest
    for (image_pattern, label_pattern), counts in sorted(found.items(), key=lambda item: -item[1].total()):
        other_labels = [labels for images, labels in found if images == image_pattern and labels != label_pattern]
        alternatives = Alternatives(others[image_pattern, label_pattern], other_labels)
        if splits := divide.choose_splits(counts):
            yield divide.Division(image_pattern, label_pattern, *splits, reason="the names of COCO files"), alternatives
        else:
            division = divide.Division(image_pattern, label_pattern, split_fraction=divide.FRACTION, reason=divide.GUESS)
            yield division.of_folder(next(iter(counts))), alternatives


def _places(file: str, images: Sequence[str]) -> dict[str, int]:
    """Returns {folder: number of images} of a COCO file's images; several folders, likeliest first, if each may be meant.

    Raises:
      UserError: the file is no COCO file.
    """
    polygons.listed(file, {})
    parts, places = collections.defaultdict(list), dict[str, int]()
    for image in images:
        parts[os.path.dirname(image)].append(image)
    for among in (images, *(parts[place] for place in sorted(parts, key=discover.unlikely_images))):
        with contextlib.suppress(UserError):  # several images of the same name
            known = {image: image for image in among}
            if in_file := [image for image in polygons.listed(file, known) if image in known]:
                places[os.path.commonpath([os.path.dirname(image) for image in in_file])] = len(in_file)
                if among is images:
                    break
    return places


def _open(folder: Folder, division: divide.Division, alternatives: Alternatives) -> Found:
    """Lists the two splits of a candidate and reads a sample of its labels.

    Raises:
      UserError: it has no pairs, or its images or labels are none.
    """
    dataset = configs.base_config().dataset
    dataset.update({"root": folder.root} | {field: value for field, value in division._asdict().items() if field in dataset})
    known = {f"{folder.root}/{path}" for path in folder.paths}
    if division.split_fraction:
        listed = _by_fraction(dataset, known)
    else:
        listed = {split: layouts.list_pairs(dataset, split) for split in (division.train_split, division.val_split)}
    pairs = {split: [pair for pair in found if {pair.image, pair.label} <= known] for split, found in listed.items()}
    if not all(pairs.values()):
        raise UserError(f"no pairs in split {next(split for split in pairs if not pairs[split])!r}")
    files = [(pair.image, pair.label) for found in pairs.values() for pair in found]
    others = known - {file for pair in files for file in pair}
    pictures = sorted(path for path in others if not path.endswith(".json"))
    if label_values.are_masks([image for image, _ in files]) and not label_values.are_masks(pictures):
        raise UserError(f"{files[0][0]}: has only a few colors, as masks have, unlike {pictures[0]}; so it is no image")
    if division.reason == divide.GUESS_FOLDERS and _are_copies(pairs):
        return _open(folder, divide.only_folder(division), alternatives)
    alone = [file for found in listed.values() for pair in found for file in (pair.image, pair.label) if file in others]
    hints = list(itertools.islice(_padded(alone), 1))
    hints += _hints_about(pictures, files)
    counts = {split: len(found) for split, found in pairs.items()}
    return Found(dataset, [*listed][-1], division.reason, counts, files, alone, hints, alternatives, label_values.count(files))


def _hints_about(others: Sequence[str], files: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yields what files beside labels may be that are not used, given them and the pairs that are."""
    directories = {os.path.dirname(label) for _, label in files} - {os.path.dirname(files[0][0])}
    extensions = {os.path.splitext(label)[1] for _, label in files}
    beside = [path for path in others if os.path.dirname(path) in directories]
    if converted := [path for path in beside if os.path.splitext(path)[1] not in extensions]:
        yield f"labels of other formats are not used, such as {converted[0]}: convert them"
    stems = {os.path.splitext(label)[0] for _, label in files}
    if parts := [path for path in others if re.sub(r"[_-]\d+$", "", os.path.splitext(path)[0]) in stems]:
        yield f"GUESS: {len(parts):,} file(s), such as {parts[0]}, are no parts of labels; otherwise, paint each label into one"


def _are_copies(pairs: Mapping[str, Sequence[layouts.Pair]]) -> bool:
    """Returns whether two splits of folders, such as {"a+b": ..., "c": ...}, have equal labels of the same names."""

    def by_name(parts: str, found: Sequence[layouts.Pair]) -> dict[str, str]:
        either = "|".join(map(re.escape, parts.split("+")))
        return {re.sub(f"^({either})/", "", pair.name): pair.label for pair in found}

    train, held_out = (by_name(*split) for split in pairs.items())
    both = [(train[name], held_out[name]) for name in sorted(train.keys() & held_out.keys())]
    return label_values.are_copies(label_values.sample(both))


def _by_fraction(dataset: ConfigDict, known: set[str]) -> dict[str, list[layouts.Pair]]:
    """Returns the examples in train and val, with the split_seed that divides them best; a single pair is in train."""
    fraction, dataset.split_fraction = dataset.split_fraction, 1.0
    found, dataset.split_fraction = layouts.list_pairs(dataset, "val"), fraction
    whole = [pair.name for pair in found if {pair.image, pair.label} <= known]
    sizes = {seed: sum(folders.position(seed, name) < fraction for name in whole) for seed in range(SEEDS)}
    wanted = max(1, round(fraction * len(whole))) if len(whole) > 1 else 0
    dataset.split_seed = min(sizes, key=lambda seed: abs(sizes[seed] - wanted))
    divided: dict[bool, list[layouts.Pair]] = {False: [], True: []}
    for pair in found:
        divided[folders.position(dataset.split_seed, pair.name) < fraction].append(pair)
    return {"train": divided[False]} | ({"val": divided[True]} if wanted else {})
