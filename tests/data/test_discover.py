"""Finding pairs and splits from the names of files alone: each layout as people publish it, a few files of it."""

import pytest

from pspnet_jax.data import discover, divide, folders

TRAIN_VAL = ("train", "val")


def found(paths, lists=None):
    """Returns the images' and labels' patterns, the splits, and the list or fraction that divides them."""
    best = discover.rules(paths)[0]
    division = divide.divide(best, paths, lists or {})
    return (
        division.images,
        division.labels,
        division.train_split,
        division.val_split,
    ), division.split_file or division.split_fraction


def files(*patterns, splits=TRAIN_VAL, names=("a_1", "b_2", "c_3")):
    return [pattern.format(split=split, name=name) for pattern in patterns for split in splits for name in names]


@pytest.mark.parametrize(
    ("images", "labels", "splits"),
    [
        ("images/{split}/{name}.jpg", "labels/{split}/{name}.png", TRAIN_VAL),
        ("{split}/images/{name}.jpg", "{split}/masks/{name}.png", TRAIN_VAL),
        ("data/{split}_images/{name}.jpg", "data/{split}_segmentations/{name}.png", TRAIN_VAL),
        ("{split}/{name}.png", "{split}annot/{name}.png", TRAIN_VAL),
        ("{split}/{name}.png", "{split}_labels/{name}_L.png", TRAIN_VAL),
        ("{split}/{name}.jpg", "{split}/{name}_mask.png", ("train", "valid")),
        ("images/{split}2017/{name}.jpg", "annotations/{split}2017/{name}.png", TRAIN_VAL),
        ("leftImg8bit/{split}/{name}_leftImg8bit.png", "gtFine/{split}/{name}_gtFine_labelIds.png", TRAIN_VAL),
        ("images{split}/{name}.png", "labels{split}/{name}.png", ("Tr", "Ts")),
        ("{split}/{split}-org-img/{name}.jpg", "{split}/{split}-label-img/{name}_lab.png", TRAIN_VAL),
        ("{split}/images/{name}.png", "{split}/Semantic_masks/images/{name}_instance_color_RGB.png", TRAIN_VAL),
        ("{split}/images/{name}_{split}.tif", "{split}/1st_manual/{name}_manual1.gif", ("training", "test")),
        ("Task1-2_{split}_Input/{name}.jpg", "Task1_{split}_GroundTruth/{name}_segmentation.png", ("Training", "Validation")),
    ],
)
def test_splits_in_folders(images, labels, splits):
    assert found(files(images, labels, splits=splits)) == ((images, labels, *splits), 0.0)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("images/{name}.jpg", "masks/{name}.png"),
        ("deep/er/images/{name}.jpg", "deep/er/masks/{name}.png"),
        ("imgs/{name}_img.jpg", "gts/{name}_gt.png"),
        ("imgs/img_{name}.png", "msks/msk_{name}.png"),
        ("{name}_sat.jpg", "{name}_mask.png"),
        ("{name}.jpg", "{name}.png"),
        ("{name}.png", "{name}.json"),
        ("4_Ortho_RGBIR/{name}_RGBIR.tif", "{name}_label.tif"),
        ("photo/{name}.jpg", "v1.2/{name}.png"),
        ("imagesTr/{name}_0000.png", "labelsTr/{name}.png"),
        ("pictures/{name}.png", "object_color/images/{name}.png"),
        ("images/img_{name}.png", "masks/gt_mask_{name}.png"),
    ],
)
def test_without_splits_a_fraction_is_held_out(images, labels):
    names = [f"{i:03}" for i in range(12)] if "_mask_" in labels else ("a_1", "b_2", "c_3")
    assert found(files(images, labels, splits=[""], names=names)) == ((images, labels, "train", "val"), divide.FRACTION)


@pytest.mark.parametrize(
    ("images", "labels", "patterns"),
    [
        ("sar/{}__{}_0.png", "zones/{}_zones__{}_0.png", ("sar/{name}.png", "zones/{name}_zones{tail}.png")),  # CaFFe
        ("image/{2}_{1}.png", "gt/{2}_road_{1}.png", ("image/{name}.png", "gt/{name}_road{tail}.png")),  # KITTI
        (
            "cam/{}_camera_x_{}.png",
            "gt/{}_label_x_{}.png",
            ("cam/{name}_camera{tail}.png", "gt/{name}_label{tail}.png"),
        ),  # A2D2
    ],
)
def test_a_word_inside_the_name(images, labels, patterns):
    paths = [path.format(f"{2018 + i}_ab", 5 * i, ("um", "umm", "uu")[i % 3]) for path in (images, labels) for i in range(6)]
    assert found(paths) == ((*patterns, "train", "val"), divide.FRACTION)
    assert discover.match(patterns[0], paths, ()).keys() == discover.match(patterns[1], paths, ()).keys()


@pytest.mark.parametrize(
    ("images", "labels", "patterns"),
    [
        ("data/{}.jpg", "labels/{}.png", ("data/{name}.jpg", "labels/{name}.png")),
        ("data/{}.jpg", "masks/{}_mask.png", ("data/{name}.jpg", "masks/{name}_mask.png")),
        ("{}.jpg", "{}_mask.png", ("{name}.jpg", "{name}_mask.png")),
    ],
)
@pytest.mark.parametrize("kinds", [("IMG_{}", "DSC_{}"), ("left_{}", "right_{}"), ("{}_left", "{}_right"), ("{}_rgb", "{}_ir")])
def test_equal_names_come_before_words_that_differ(images, labels, patterns, kinds):
    names = [kind.format(f"{i:03}") for kind in kinds for i in range(10)]
    assert found([path.format(name) for path in (images, labels) for name in names])[0][:2] == patterns


def test_labels_are_no_images():
    paths = [
        f"{season}/a{i}/a{i}_{kind}.tif" for season in ("fall", "snow") for i in range(4) for kind in ("10m_RGB", "labels")
    ]
    assert found(paths)[0][:2] == ("{name}_10m_RGB.tif", "{name}_labels.tif")
    assert not discover.rules([f"{role}/{i}.tif" for role in ("labels", "masks") for i in range(4)])


def test_a_folder_above_all_others_names_no_split():
    paths = files("test/data/images_{split}/{name}.png", "test/data/annotations_{split}/{name}.png")
    assert found(paths)[0] == ("test/data/images_{split}/{name}.png", "test/data/annotations_{split}/{name}.png", *TRAIN_VAL)


def test_numbers_in_parentheses():
    paths = [f"{path}({i}).tif" for path in ("input/img", "labels/target") for i in range(1, 5)]
    assert found(paths)[0][:2] == ("input/img{name}.tif", "labels/target{name}.tif")


def test_splits_in_names():
    paths = files("{split}_{name}.bmp", "{split}_{name}_anno.bmp", splits=("train", "test"), names="123")
    assert found(paths) == (("{split}{name}.bmp", "{split}{name}_anno.bmp", "train", "test"), 0.0)


def test_long_words_are_read_in_no_time():
    assert found([f"{role}/{60 * letter}.png" for role in ("images", "masks") for letter in "abc"])[0][0] == "images/{name}.png"


def test_a_running_number_is_no_affix():
    paths = [f"masks/gt_mask_00{i}.png" for i in range(8)]
    assert not [rule for rule in discover.rules(paths) if rule.rank > 0]


def test_labels_of_several_kinds_are_ranked_by_their_words():
    paths = files(
        "rgb/{name}.png", *(f"gt/{{name}}_{kind}.png" for kind in ("color", "instanceIds", "labelIds", "labelTrainIds"))
    )
    best = [rule.labels for rule in discover.rules(paths) if rule.images == "rgb/{name}.*"]
    assert best == [f"gt/{{name}}_{kind}.*" for kind in ("labelTrainIds", "labelIds", "color", "instanceIds")]


def test_the_name_may_be_a_folder():
    paths = [f"case_{i}/{role}.png" for i in range(5) for role in ("image", "label", "depth")]
    assert found(paths)[0][:2] == ("{name}/image.png", "{name}/label.png")


def test_folders_with_images_and_labels_of_their_own_become_splits():
    def paths(scenes):
        return [f"{scene}/{role}/{i}.png" for scene in scenes for role in ("Images", "Labels") for i in range(2)]

    named = found(paths(["Train/Urban", "Train/Rural", "Val/Urban", "Val/Rural"]))
    patterns = "{split}/Images/{name}.png", "{split}/Labels/{name}.png"
    assert named == ((*patterns, "Train/Rural+Train/Urban", "Val/Rural+Val/Urban"), 0.0)
    assert found(paths("abcdef")) == ((*patterns, "b+c+d+e", "a+f"), 0.0)


def test_only_one_split_with_labels_is_divided():
    paths = files("{split}/images/{name}.tif", splits=("train", "test")) + files("train/gt/{name}.tif", splits=[""])
    assert found(paths) == (("train/images/{name}.tif", "train/gt/{name}.tif", "train", "val"), divide.FRACTION)


def test_lists_divide_and_choose_between_rules():
    paths = [*files("JPEGImages/{name}.jpg", "SegmentationClass/{name}.png", splits=[""])]
    lists = {
        "sets/Segmentation/train.txt": "a_1\nb_2\n",
        "sets/Segmentation/val.txt": "c_3\n",
        "sets/Main/train.txt": "x\ny\nz\n",
    }
    fields = "JPEGImages/{name}.jpg", "SegmentationClass/{name}.png", "train", "val"
    assert found(paths, lists) == (fields, "sets/Segmentation/{split}.txt")
    assert found(paths, {"meta.csv": "image,split\na_1.jpg,train\nb_2.jpg,train\nc_3.jpg,valid\n"})[0][3] == "valid"
    assert found(paths, {"train.txt": "x\n", "val.txt": "y\n"})[1] == divide.FRACTION  # they list other images


@pytest.mark.parametrize(
    "text",
    [
        "a\nb\n",
        "./a.jpg\nb.jpg",
        "images/a.jpg\nimages/b.jpg\n",
        "a 1\nb -1",
        "images/a.jpg masks/a.png\nimages/b.jpg masks/b.png",
    ],
)
def test_lists_are_found_in_every_form_in_which_they_are_read(text):
    images = {name: f"images/{name}.jpg" for name in "abc"}
    splits = ("train", "val", "{split}.txt", 0.0, "the lists {split}.txt")
    assert divide.find_lists(images, {"train.txt": text, "val.txt": "c"}) == splits
    rows, columns = folders.parse_list(text.splitlines())
    names = folders._names([row.image.removeprefix("./") for row in rows], images, "train.txt")
    assert names == {"a", "b"}
    assert "split" not in columns


def test_texts_that_list_other_files_are_no_lists():
    images = {f"IMG {i}": f"images/IMG {i}.jpg" for i in range(4)}
    assert divide.find_lists(images, {"train.txt": "IMG 0\nIMG 1", "val.txt": "IMG 2"}) is not None
    assert divide.find_lists(images, {"train.txt": "IMG 7\nIMG 8", "val.txt": "IMG 9"}) is None
    unbalanced = 'image,remark\nIMG 0.jpg,"' + 200_000 * "x"
    assert divide.find_lists(images, {"train.csv": unbalanced}) is None
    assert not divide.lists_pairs("train.csv", unbalanced, {*images.values()})


@pytest.mark.parametrize("header", ["image,label,split", "split;file_name", "Subset\tIMG\tmask_path"])
def test_columns_of_a_table_are_found_by_every_name_by_which_they_are_read(header):
    separator = next(s for s in ",;\t" if s in header)
    columns = [word.lower() for word in header.split(separator)]
    kinds = {"img": "image", "file_name": "image", "mask_path": "label", "subset": "split"}
    values = {"image": "a.jpg", "label": "a.png", "split": "train"}
    lines = [header, separator.join(values[kinds.get(column, column)] for column in columns)]
    (row,), _ = folders.parse_list(lines)
    assert (row.image, row.split) == ("a.jpg", "train")
    val = separator.join({"image": "b.jpg", "label": "b.png", "split": "val"}[kinds.get(column, column)] for column in columns)
    found = divide.find_lists({"a": "a.jpg", "b": "b.jpg"}, {"all.csv": "\n".join([*lines, val])})
    assert found[:3] == ("train", "val", "all.csv")


@pytest.mark.parametrize(
    "paths",
    [
        [f"images/{i}.png" for i in range(9)] + [f"masks/{i:03d}.png" for i in range(9)],  # they differ in their zeros
        files("train/{name}.jpg", "test/{name}.jpg", splits=[""]),  # the same names in two splits are no labels
        ["a.jpg"],
    ],
)
def test_no_rule(paths):
    assert not discover.rules(paths)
