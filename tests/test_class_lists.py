"""Lists of classes are read in all common forms; an ambiguous line is an error."""

import pytest

from pspnet_jax import class_lists, datasets
from pspnet_jax.config import base_config
from pspnet_jax.errors import UserError

TWO = (("sky", "traffic light"), {})
COLORED = (("sky", "traffic light"), {0: (1, 2, 3), 1: (250, 170, 30)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sky\ntraffic light\n", TWO),
        ("\ufeff# my classes\r\n\r\nsky # blue\r\n  traffic light\t\r\n#\r\n", TWO),
        ("0 sky\n1 traffic light\n", TWO),
        ("0: sky\n1: traffic light\n255: void\n", TWO),
        ("1,traffic light\n0,sky\n", TWO),
        ("'sky'\n\"traffic light\"\n", TWO),
        ("sky,\ntraffic light,\n", TWO),
        ("sky;\ntraffic light;", TWO),
        ("id\tname\n0\tsky\n1\ttraffic light\n", TWO),
        ("sky 1 2 3\ntraffic light  250\t170 30", COLORED),
        ("1 2 3\tsky\n250 170 30\t\ttraffic light\n", COLORED),
        ("1,2,3,sky\n250,170,30,traffic light", COLORED),
        ('1,2,3,"sky, blue"\n250;170;30;"a; b";', (("sky, blue", "a; b"), COLORED[1])),
        ("sky: 1 2 3\ntraffic light: 250 170 30", COLORED),
        ("sky #010203\ntraffic light #faaa1e", COLORED),
        ("0 sky 1 2 3\n1 traffic light 250 170 30", COLORED),
        ("sky,1,2,3\ntraffic light,250,170,30", COLORED),
        ('"sky"; 1; 2; 3\n"traffic light"; 250; 170; 30;\n', COLORED),
        ("sky\t1\t2\t3\ntraffic light\t250\t170\t30", COLORED),
        ("name,r,g,b\nsky,1,2,3\ntraffic light,250,170,30\n", COLORED),
        ("name, r, g, b\nsky, 1, 2, 3\ntraffic light, 250, 170, 30\n", COLORED),
        ("R,G,B,Class\n250,170,30,traffic light\n1,2,3,sky", (COLORED[0][::-1], {0: (250, 170, 30), 1: (1, 2, 3)})),
        ("name r g b\nsky 1 2 3\nroad 4 5 6", (("sky", "road"), {0: (1, 2, 3), 1: (4, 5, 6)})),
        ("class_name,class_id\ntraffic light,1\nsky,0", TWO),
        ("lane 2\n2 wheeler\nroad 2 1 2 3", (("lane 2", "2 wheeler", "road 2"), {2: (1, 2, 3)})),
        ("lane 1\nlane 2", (("lane 1", "lane 2"), {})),
        ("'a: b'\n\"road 2\" 1 2 3\n'sky 1'", (("a: b", "road 2", "sky 1"), {1: (1, 2, 3)})),
        ("door, double door\nwall [inner]", (("door, double door", "wall [inner]"), {})),
        ("# label:color_rgb:parts:actions\nsky:1,2,3::\ntraffic light:250,170,30::", COLORED),
    ],
)
def test_forms(text, expected):
    assert class_lists.parse(text, "classes.txt") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('["sky", "traffic light"]', TWO),
        ('{"labels": {"traffic light": 1, "sky": 0}}', TWO),
        ('{"1": "traffic light", "0": "sky"}', TWO),
        ('{"sky": [1, 2, 3], "traffic light": [250, 170, 30]}', COLORED),
        ('{"#010203": "sky", "#FAAA1E": "traffic light"}', COLORED),
        (
            '{"v": 1, "all": [{"title": "sky", "color": "#010203"}, {"title": "traffic light", "color": [250, 170, 30]}]}',
            COLORED,
        ),
        ('[{"id": 1, "name": "traffic light"}, {"id": 0, "name": "sky"}]', TWO),
        ('[{"id": "a7", "name": "sky"}, {"id": "b2", "name": "traffic light"}]', TWO),
    ],
)
def test_forms_of_json(text, expected):
    assert class_lists.parse(text, "classes.json") == expected
    for wrong, why in ((text[:-1], ": is not JSON"), ('{"version": 3.5, "images": [1, 2]}', ", line 1: lists no classes")):
        with pytest.raises(UserError, match=f"^classes.json{why}"):
            class_lists.parse(wrong, "classes.json")


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("name\nsky\nroad", 1, "'name' looks like a header"),
        ("\n# x\nclass, area\nsky, 5\n", 3, "the header has columns other than"),
        ("1 sky\n2 road", 1, "'sky' has label 1, expected 0"),
        ("0 sky\n2 road", 2, "'road' has label 2, expected 1"),
        ("0 sky\n0 road", 2, "'road' has label 0, expected 1"),
        ("sky,1,2,3,255\nroad,1,2,3,255", 1, "1, 2, 3, 255 after the name is not a color"),
        ("sky 1 2 3\nroad 1 2 300", 2, "1, 2, 300 after the name is not a color"),
        ("sky,0.5,0.5,0.5", 1, "0.5, 0.5, 0.5 after the name is not a color"),
        ("name,r,g,b\nsky,1,2", 2, "has 3 fields, but the header has 4"),
        ("name,id\nsky,zero", 2, "'zero' is not a label value"),
        ("128 64 128\n0 0 0\n", 1, "has no name"),
        ("- sky\n- road", 1, "'- sky' is not just a name"),
        ("['sky', 'road']", 1, "is not just a name"),
        ('["sky",\n"road"]', 1, "is not just a name"),
        ("background:0,0,0::\nroad:128,0,300::", 2, "128, 0, 300 after the name is not a color"),
        (
            "road 128 64 128 255\nsky 1 2 3 255",
            1,
            "'road 128' ends in a number that is not part of a color; expected one class per line",
        ),
        ("sky\nroad 0.5 0.25 0.5", 2, "'road 0.5 0.25 0.5' is not just a name"),
        ("0 road 1234\n1 sky 77", 1, "'0 road 1234' ends in a number"),
        ("road 1\nsky 0", 1, "'road 1' ends in a number"),
        ("road #80408080\nsky #11223344", 1, "is not just a name"),
        ("names:\n  0: road\n  1: sky", 1, "'names:' is not just a name"),
        ("nc: two\nnames: ['road', 'sky']", 1, "'nc: two' is not just a name"),
        ('{\n  "0": "road",\n  "1": "sky"\n}', 1, "'{' is not just a name"),
        ("<class>road</class>\n<class>sky</class>", 1, "is not just a name"),
    ],
)
def test_an_ambiguous_line_is_named(text, line, why):
    with pytest.raises(UserError) as error:
        class_lists.parse(text, "x/classes.txt")
    assert str(error.value).startswith(f"x/classes.txt, line {line}: ")
    assert why in str(error.value)


def test_an_empty_list(tmp_path):
    with pytest.raises(UserError, match=r"classes.txt: contains no classes"):
        class_lists.parse("\n# nothing\n", "classes.txt")


def test_a_class_dict_is_read_and_classes_txt_must_not_contradict_it(tmp_path):
    dataset = base_config().dataset
    dataset.root = str(tmp_path)
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nsky,1,2,3\nroad,4,5,6\n")
    info = datasets.describe(dataset)
    assert (info.class_names, info.colors) == (("sky", "road"), ((1, 2, 3), (4, 5, 6)))
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    assert datasets.describe(dataset).class_names == ("sky", "road")
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    with pytest.raises(UserError, match=r"classes.txt and class_dict.csv differ in their classes or the order; remove"):
        datasets.describe(dataset)


@pytest.mark.parametrize("contents", ["a\nb\nA\n", "a 1 2 3\nb\n a \n"])
def test_two_classes_of_the_same_name_are_an_error(tmp_path, contents):
    dataset = base_config().dataset
    dataset.root = str(tmp_path)
    (tmp_path / "classes.txt").write_text(contents)
    with pytest.raises(UserError, match=r"classes 0 and 2 of dataset 'folder' are both '[aA]'"):
        datasets.describe(dataset)


def test_text_that_is_not_utf_8(tmp_path):
    dataset = base_config().dataset
    dataset.root = str(tmp_path)
    for contents in ("stra\u00dfe\nweg".encode("latin-1"), "a\nb".encode("utf-16"), "a\nb".encode("utf-16-le")):
        (tmp_path / "classes.txt").write_bytes(contents)
        with pytest.raises(UserError, match=r"classes.txt: is not UTF-8 text"):
            datasets.describe(dataset)
