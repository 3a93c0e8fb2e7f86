import hashlib
import json

import numpy as np
import pytest

from dsnet_jax.data import specs
from dsnet_jax.data.specs import (
    ADE20K,
    CAMVID,
    PASCAL_CONTEXT,
    PASCAL_CONTEXT_60,
    PASCAL_CONTEXT_IDS,
    SHAPES,
    VOC2012,
    DatasetSpec,
    parse_class_list,
)
from dsnet_jax.errors import InputError


@pytest.mark.parametrize("spec", [SHAPES, CAMVID, VOC2012, ADE20K, PASCAL_CONTEXT, PASCAL_CONTEXT_60])
def test_a_spec_survives_json(spec):
    assert DatasetSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_the_known_data_sets_have_their_published_classes_and_colours():
    assert (SHAPES.num_classes, CAMVID.num_classes, VOC2012.num_classes) == (5, 11, 21)
    assert SHAPES.class_names == ("background", "table", "chair", "plant", "lamp")
    assert CAMVID.class_names[3] == "road" and CAMVID.palette[3] == (128, 64, 128)
    assert CAMVID.class_names[10] == "bicyclist" and CAMVID.palette[10] == (0, 128, 192)
    named = dict(zip(VOC2012.class_names, VOC2012.palette, strict=True))  # From the VOC development kit's colour map.
    assert named["background"] == (0, 0, 0)
    assert named["aeroplane"] == (128, 0, 0)
    assert named["bicycle"] == (0, 128, 0)
    assert named["cat"] == (64, 0, 0)
    assert named["person"] == (192, 128, 128)
    assert named["sheep"] == (128, 64, 0)
    assert named["tvmonitor"] == (0, 64, 128)
    assert specs.voc_palette(256)[255] == specs.IGNORE_COLOUR


def test_ade20k_s_classes_are_in_the_order_of_their_share_of_pixels_as_its_list_has_them():
    assert ADE20K.num_classes == 150
    assert ADE20K.class_names[:5] == ("wall", "building", "sky", "floor", "tree")
    assert ADE20K.class_names != tuple(sorted(ADE20K.class_names))
    places = {"bed": 8, "person": 13, "chest of drawers": 45, "screen door": 59, "television": 90, "flag": 150}
    assert {name: ADE20K.class_names.index(name) + 1 for name in places} == places  # objectInfo150.txt counts from 1.
    named = dict(zip(ADE20K.class_names, ADE20K.palette, strict=True))
    assert (named["wall"], named["sky"], named["flag"]) == ((120, 120, 120), (6, 230, 230), (92, 0, 255))


def test_pascal_context_s_classes_are_the_names_of_their_ids_among_the_459():
    pairs = dict(zip(PASCAL_CONTEXT_IDS, PASCAL_CONTEXT.class_names, strict=True))
    # From labels.txt of the data set, where lines are "<id>: <name>"; the order of the ids is that of the names.
    known = {2: "aeroplane", 9: "bag", 18: "bed", 284: "person", 397: "table", 427: "tvmonitor", 458: "wood"}
    assert {id_: pairs[id_] for id_ in known} == known
    assert len(pairs) == 59 and list(pairs) == sorted(pairs) and list(pairs.values()) == sorted(pairs.values())
    assert set(VOC2012.class_names) - {"background", "diningtable"} < set(PASCAL_CONTEXT.class_names)
    assert PASCAL_CONTEXT_60.class_names == ("background", *PASCAL_CONTEXT.class_names)
    assert PASCAL_CONTEXT_60.palette == ((0, 0, 0), *PASCAL_CONTEXT.palette)


def digest(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_the_order_of_the_known_classes_is_that_of_their_sources_and_does_not_change():
    # The SegNet tutorial's order (github.com/alexgkendall/SegNet-Tutorial, Scripts/test_segmentation_camvid.py).
    segnet = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
    assert CAMVID.class_names == tuple(segnet.split())
    # The first name of each line of objectInfo150.txt (github.com/CSAILVision/sceneparsing), stray spaces aside.
    assert digest(ADE20K.class_names) == "ffd47f2fcbad6c484a3e320702ff1278dae14e78d443d81987142210b70c5032"
    # "<id> <name>": the ids are the sorted ones of PyTorch-Encoding's and mmsegmentation's converters.
    pairs = [f"{id_} {name}" for id_, name in zip(PASCAL_CONTEXT_IDS, PASCAL_CONTEXT.class_names, strict=True)]
    assert digest(pairs) == "82fe4ebad76284065cfbd8fbe34269ef6718084b54eb82264da05e396e6798df"


@pytest.mark.parametrize("spec", [SHAPES, CAMVID, VOC2012, PASCAL_CONTEXT, PASCAL_CONTEXT_60])
def test_no_two_classes_look_alike(spec):
    assert len({*spec.palette, specs.IGNORE_COLOUR}) == spec.num_classes + 1


def test_labels_are_drawn_in_their_colours_and_ignored_ones_in_voc_s():
    colours = SHAPES.colourise(np.array([[0, 4], [255, 2]], np.uint8))
    assert colours.dtype == np.uint8
    assert colours.tolist() == [[[*SHAPES.palette[0]], [*SHAPES.palette[4]]], [[224, 224, 192], [*SHAPES.palette[2]]]]


def test_drawing_a_label_that_is_no_class_is_an_error():
    with pytest.raises(ValueError, match=r"labels \[5, 254\] are none of the 5 classes of shapes"):
        SHAPES.colourise(np.array([[5, 254, 0, 255]], np.uint8))


@pytest.mark.parametrize(
    ("names", "palette", "message"),
    [
        ((), (), "0 classes"),
        (tuple(map(str, range(256))), specs.voc_palette(256), "256 classes"),
        (("a", "a"), ((0, 0, 0), (1, 1, 1)), "'a' is named more than once"),
        (("a", "b"), ((0, 0, 0),), "2 classes, but 1 colours"),
        (("a", " "), ((0, 0, 0), (1, 1, 1)), "class 1 has no name"),
        (("a",), ((0, 0, 256),), "is not a colour"),
        (("a",), ((128.0, 0, 0),), "is not a colour"),
        (("a",), ((True, 0, 0),), "is not a colour"),
        (("a",), ((0, 0),), "is not a colour"),
    ],
)
def test_a_spec_that_contradicts_itself_is_an_error(names, palette, message):
    with pytest.raises(ValueError, match=message):
        DatasetSpec("x", names, palette)


def parse(content, path="classes.txt", name="town"):
    return parse_class_list(content if isinstance(content, bytes) else content.encode(), path, name)


def test_a_class_list_has_one_name_a_line():
    classes = parse("road\n\n  traffic light \ncar\n")
    assert classes.spec == DatasetSpec("town", ("road", "traffic light", "car"), specs.voc_palette(3))
    assert classes.ignore_values == ()
    assert classes.labels_of_colours is None


def test_a_class_may_have_a_name_that_begins_like_ignore():
    classes = parse("ignored\nignore\nignore this one")
    assert classes.spec.class_names == ("ignored", "ignore", "ignore this one") and classes.ignore_values == ()


def test_a_class_list_may_declare_colours_and_what_to_ignore():
    text = "road #804080\ntraffic light #FAAA1E\nignore #000000\nignore 200\nignore 254"
    classes = parse(text)
    assert classes.spec == DatasetSpec("town", ("road", "traffic light"), ((128, 64, 128), (250, 170, 30)))
    assert classes.ignore_values == (200, 254)
    assert classes.labels_of_colours == {(128, 64, 128): 0, (250, 170, 30): 1, (0, 0, 0): 255}


def test_a_class_list_in_json_says_the_same():
    text = "road #804080\ntraffic light #faaa1e\nignore #000000\nignore 254"
    content = {"class_names": ["road", "traffic light"], "palette": [[128, 64, 128], [250, 170, 30]]}
    as_json = json.dumps(content | {"ignore": ["#000000", 254]})
    assert parse(as_json, "classes.json") == parse(text)
    assert parse(json.dumps(CAMVID.to_json()), "camvid.json", "camvid").spec == CAMVID


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 classes"),
        ("road\nroad", "'road' is named more than once"),
        ("road #804080\ncar", "1 of 2 classes have a colour: give one to all or to none"),
        ("road #80408", "'#80408' is neither a value nor a colour"),
        ("road #804080\ncar #804080", "#804080 is given twice"),
        ("road #804080\nignore #804080", "#804080 is given twice"),
        ("road\ncar\nignore 1", "cannot ignore value 1: it has to be 2 to 255"),
        ("road\nignore 256", "cannot ignore value 256"),
        ("road\nignore #804080", "ignores colour #804080, but no class has a colour"),
        ("# my classes\nroad", "'# my classes' is no name of a class"),
        ("ignore 254 253\nroad", "'ignore 254 253' is no name of a class: write `ignore 254`, one a line"),
        ("ignore 254,255\nroad", "no name of a class"),
        ("ignore 254  # void\nroad", "no name of a class"),
        ("ignore: 254\nroad", "no name of a class"),
        ("Ignore 254\nroad", "no name of a class"),
        ("Ignore #e0e0c0\nroad #804080", "no name of a class"),
    ],
)
def test_a_class_list_that_contradicts_itself_is_refused_with_its_name(text, message):
    with pytest.raises(InputError) as error:
        parse(text)
    assert str(error.value).startswith("classes.txt: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("[" * 100_000, "recursion"),
        ("[1]", 'wants {"class_names"'),
        ('{"classes": []}', 'wants {"class_names"'),
        ('{"class_names": ["a", null]}', "class_names has null, which is no string: write names in quotes"),
        ('{"class_names": ["a", 3]}', "class_names has 3, which is no string"),
        ('{"class_names": [["a"]]}', 'class_names has ["a"], which is no string'),
        ('{"class_names": ["a"], "colours": []}', "not 'colours'"),
        ('{"class_names": ["a"], "palette": [1]}', "wants lists"),
        ('{"class_names": ["a\\u001b[31m"]}', "has control characters: rename it"),
        ('{"class_names": ["a", "b\\nc"]}', "has control characters: rename it"),
        ('{"class_names": ["a", ""]}', "class 1 has no name"),
        ('{"class_names": ["a"], "palette": [["red", 0, 0]]}', "is not a colour"),
        ('{"class_names": ["a"], "palette": [[128.0, 0, 0]]}', "is not a colour: three integers"),
        ('{"class_names": ["a"], "palette": [[[1], 0, 0]]}', "is not a colour"),
        ('{"class_names": ["a"], "ignore": 7}', "wants lists"),
        ('{"class_names": ["a"], "ignore": "254"}', "wants lists"),
        ('{"class_names": ["a"], "palette": ["red"]}', "wants lists"),
        ('{"class_names": ["a"], "ignore": [[1, 2, 3]]}', "neither a value nor a colour"),
        ('{"class_names": ["a"], "ignore": [2.5]}', "neither a value nor a colour"),
    ],
)
def test_a_json_class_list_of_another_form_is_refused_with_its_name(text, message):
    with pytest.raises(InputError) as error:
        parse(text, "classes.json")
    assert str(error.value).startswith("classes.json: ")
    assert message in str(error.value)


def test_a_class_list_that_is_no_text_is_refused():
    with pytest.raises(InputError, match=r"classes\.txt: "):
        parse(b"\xff\xfe\x00\x80")


@pytest.mark.parametrize("path", ["classes.txt", "classes.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_a_class_list_in_another_encoding_is_refused_with_what_to_do(path, encoding):
    text = "café\ncar\n" if path == "classes.txt" else '{"class_names": ["café", "car"]}'
    with pytest.raises(InputError, match=rf"^{path}: .*: save it as UTF-8$"):
        parse(text.encode(encoding), path)


def test_a_byte_order_mark_and_the_line_ends_of_windows_are_no_part_of_a_class_list():
    lines = "road #804080\r\ntraffic light #faaa1e\r\nignore 254\r\n"
    assert parse(b"\xef\xbb\xbf" + lines.encode()) == parse(lines.replace("\r", ""))
    as_json = json.dumps({"class_names": ["road", "car"]}, indent=1).replace("\n", "\r\n")
    assert parse(b"\xef\xbb\xbf" + as_json.encode(), "classes.json") == parse("road\ncar")
