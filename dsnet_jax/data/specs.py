"""What a data set's labels mean: class names and colours. Labels are 0 to K - 1; 255 is never trained on or scored."""

import json
import re
from dataclasses import asdict, dataclass

import numpy as np

from dsnet_jax.data import class_tables
from dsnet_jax.data.files import check_printable
from dsnet_jax.errors import InputError

IGNORE_LABEL = 255
IGNORE_COLOUR = (224, 224, 192)  # PASCAL VOC's.

Colour = tuple[int, int, int]


def _is_colour(colour: tuple) -> bool:
    return len(colour) == 3 and all(type(channel) is int and channel in range(256) for channel in colour)


@dataclass(frozen=True)
class DatasetSpec:
    """The classes of a data set.

    Attributes:
      name: of the data set.
      class_names: K names, 1 to 255 of them, each once; the position is the label.
      palette: K colours (red, green, blue), 0 to 255.

    Raises:
      ValueError: any of this does not hold.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[Colour, ...]

    def __post_init__(self):
        if not 1 <= len(self.class_names) <= IGNORE_LABEL:
            raise ValueError(f"{len(self.class_names)} classes: there can be 1 to {IGNORE_LABEL}")
        if twice := sorted({name for name in self.class_names if self.class_names.count(name) > 1}):
            raise ValueError(f"class {twice[0]!r} is named more than once")
        if unnamed := [label for label, name in enumerate(self.class_names) if not name.strip()]:
            raise ValueError(f"class {unnamed[0]} has no name")
        if len(self.palette) != len(self.class_names):
            raise ValueError(f"{len(self.class_names)} classes, but {len(self.palette)} colours")
        if bad := [colour for colour in self.palette if not _is_colour(colour)]:
            raise ValueError(f"{bad[0]} is not a colour: three integers from 0 to 255")

    @property
    def num_classes(self) -> int:
        """K, the ignore label not counted."""
        return len(self.class_names)

    def to_json(self) -> dict:
        """The spec as JSON types; `from_json` makes it a spec again."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, spec: dict) -> "DatasetSpec":
        """The spec that `to_json` was called on."""
        palette = tuple(tuple(colour) for colour in spec["palette"])
        return cls(spec["name"], tuple(spec["class_names"]), palette)

    def colourise(self, labels: np.ndarray) -> np.ndarray:
        """Each label in its colour, the ignore label in `IGNORE_COLOUR`.

        Args:
          labels: uint8 [H, W], 0 to K - 1 or 255.

        Returns:
          RGB, uint8 [H, W, 3].

        Raises:
          ValueError: another value.
        """
        table = np.zeros((256, 3), np.uint8)
        table[: self.num_classes] = self.palette
        table[IGNORE_LABEL] = IGNORE_COLOUR
        if strange := set(np.unique(labels).tolist()) - {*range(self.num_classes), IGNORE_LABEL}:
            raise ValueError(f"labels {sorted(strange)} are none of the {self.num_classes} classes of {self.name}")
        return table[labels]


def voc_palette(count: int) -> tuple[Colour, ...]:
    """The first `count` of PASCAL VOC's 256 colours: the bits of the index, dealt to red, green and blue in turn."""

    def channel(index: int, shift: int) -> int:
        return sum((index >> (3 * bit + shift) & 1) << (7 - bit) for bit in range(3))

    return tuple((channel(index, 0), channel(index, 1), channel(index, 2)) for index in range(count))


_SHAPES_COLOURS = {
    "background": (38, 50, 72),
    "table": (214, 137, 72),
    "chair": (86, 156, 214),
    "plant": (106, 176, 76),
    "lamp": (244, 211, 94),
}
SHAPES = DatasetSpec("shapes", tuple(_SHAPES_COLOURS), tuple(_SHAPES_COLOURS.values()))

_CAMVID_COLOURS = {  # Of the SegNet tutorial; its twelfth class, void, is the ignore label.
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
CAMVID = DatasetSpec("camvid", tuple(_CAMVID_COLOURS), tuple(_CAMVID_COLOURS.values()))

_VOC_NAMES = """background aeroplane bicycle bird boat bottle bus car cat chair cow
diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor"""
VOC2012 = DatasetSpec("voc2012", tuple(_VOC_NAMES.split()), voc_palette(21))

_ADE20K_LINES = [line.split(maxsplit=3) for line in class_tables.ADE20K.strip().splitlines()]
ADE20K = DatasetSpec(
    "ade20k",
    tuple(name for *_, name in _ADE20K_LINES),
    tuple((int(red), int(green), int(blue)) for red, green, blue, _ in _ADE20K_LINES),
)

_CONTEXT_PAIRS = [line.split() for line in class_tables.PASCAL_CONTEXT.strip().splitlines()]
PASCAL_CONTEXT_IDS = tuple(int(id_) for id_, _ in _CONTEXT_PAIRS)  # Of the categories, by label.
_CONTEXT_NAMES = tuple(name for _, name in _CONTEXT_PAIRS)
# The benchmark has no colours of its own: a class has the same one with background and without.
PASCAL_CONTEXT = DatasetSpec("pascal_context", _CONTEXT_NAMES, voc_palette(60)[1:])
PASCAL_CONTEXT_60 = DatasetSpec("pascal_context_60", ("background", *_CONTEXT_NAMES), voc_palette(60))


@dataclass(frozen=True)
class ClassList:
    """A user's own classes.

    Attributes:
      spec: with the declared colours, or PASCAL VOC's where none are declared.
      ignore_values: mask values that mean the ignore label, besides 255.
      labels_of_colours: label by colour for RGB masks, the ignore label among them; None: no colours are declared.
    """

    spec: DatasetSpec
    ignore_values: tuple[int, ...]
    labels_of_colours: dict[Colour, int] | None


def parse_class_list(data: bytes, path: str, name: str) -> ClassList:
    """The classes of data set `name` from the content of a text or a JSON file.

    A text file has one class a line in the order of the labels: `road`, or `road #804080` with its colour. Lines such
    as `ignore 254` or `ignore #e0e0c0` name mask values or colours that are not to be trained on. A JSON file (its name
    ends in .json) says the same: `{"class_names": ["road", ...], "palette": [[128, 64, 128], ...],
    "ignore": [254, "#e0e0c0"]}`, the last two being optional. A run's dataset.json is such a file, and what it says
    of its name is passed over.

    Raises:
      InputError: the file cannot be understood, or contradicts itself.
    """
    try:
        text = _decode_text(data)
        names, colours, ignored = (_parse_json if path.endswith(".json") else _parse_lines)(text)
        if colours and len(colours) != len(names):
            raise ValueError(f"{len(colours)} of {len(names)} classes have a colour: give one to all or to none")
        for class_name in names:
            check_printable(path, class_name)
        spec = DatasetSpec(name, names, colours or voc_palette(len(names)))
        values = tuple(value for value in ignored if isinstance(value, int))
        if wrong := [value for value in values if not spec.num_classes <= value <= 255]:
            raise ValueError(f"cannot ignore value {wrong[0]}: it has to be {spec.num_classes} to 255")
        return ClassList(spec, values, _labels_of_colours(colours, set(ignored) - set(values)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from error


def _decode_text(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:  # Without a mark, its Latin letters are UTF-8 too.
        raise ValueError("in UTF-16, or no text: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8: save it as UTF-8") from error


def _labels_of_colours(palette: tuple[Colour, ...], ignored: set[Colour]) -> dict[Colour, int] | None:
    if not palette:
        if ignored:
            raise ValueError(f"ignores colour {hex_colour(min(ignored))}, but no class has a colour: give one to all")
        return None
    if twice := [colour for colour in palette if palette.count(colour) > 1 or colour in ignored]:
        raise ValueError(f"colour {hex_colour(twice[0])} is given twice: masks could not be read by colour")
    return {colour: label for label, colour in enumerate(palette)} | dict.fromkeys(ignored, IGNORE_LABEL)


_NO_NAME = re.compile(r"#|ignore\s*[\d#,:]", re.IGNORECASE)


def _parse_lines(text: str) -> tuple[tuple[str, ...], tuple[Colour, ...], list[int | Colour]]:
    names, colours, ignored = [], [], []
    for line in filter(None, map(str.strip, text.splitlines())):
        if match := re.fullmatch(r"ignore\s+(#\S+|\d+)", line):
            ignored.append(_value_or_colour(match[1]))
        elif _NO_NAME.match(line):  # As a class it would shift the labels of those below.
            raise ValueError(f"{line!r:.50} is no name of a class: write `ignore 254`, one a line, and no comments")
        elif match := re.fullmatch(r"(.+?)\s+(#\S+)", line):
            names.append(match[1])
            colours.append(_value_or_colour(match[2]))
        else:
            names.append(line)
    return tuple(names), tuple(colours), ignored


def _parse_json(text: str) -> tuple[tuple[str, ...], tuple[Colour, ...], list[int | Colour]]:
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("class_names"), list):
        raise ValueError('wants {"class_names": ["road", ...]}')
    if unknown := set(content) - {"class_names", "palette", "ignore", "name"}:
        raise ValueError(f"knows class_names, palette and ignore, not {sorted(unknown)[0]!r}")
    names = content["class_names"]
    if strange := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"class_names has {json.dumps(strange[0]):.50}, which is no string: write names in quotes")
    palette, ignored = content.get("palette", []), content.get("ignore", [])
    if not all(isinstance(value, list) for value in [palette, ignored, *palette]):
        raise ValueError('wants lists: "palette": [[128, 64, 128], ...], "ignore": [254, "#e0e0c0"]')
    return tuple(names), tuple(map(tuple, palette)), [_value_or_colour(value) for value in ignored]


def _value_or_colour(value: int | str) -> int | Colour:
    if re.fullmatch(r"\d+", str(value)):
        return int(value)
    if match := re.fullmatch(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", str(value)):
        return tuple(int(channel, 16) for channel in match.groups())
    raise ValueError(f"{value!r} is neither a value nor a colour such as #804080")


def hex_colour(colour: Colour) -> str:
    """(128, 64, 128) as #804080."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
