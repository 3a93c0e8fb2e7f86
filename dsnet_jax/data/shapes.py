"""Drawn indoor scenes with exact labels: tables, chairs, plants and lamps of very different scale.

They pose the problem of the paper's Figure 1. A table top is a large even area; chairs, plants and lamps have parts
three or four pixels wide, which a coarse feature map loses. Each class has colours of its own, blurred by light and
texture, so that a small network learns them in minutes: the difficulty is in the outlines.

A scene is a list of convex polygons, far to near, filled into one map of polygon numbers at four times the resolution.
The image averages the polygons' colours over each pixel, the label is the class that covers most of it.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

BACKGROUND, TABLE, CHAIR, PLANT, LAMP = range(5)
PLAIN, GRAIN_ACROSS, GRAIN_UPRIGHT, MOTTLED, WOVEN = range(5)  # Textures.
SUPERSAMPLING = 4  # Cells of the polygon map per pixel, along each axis.
FIXED_POINT_BITS = 4  # Of polygons' corners. (OpenCV fills the cells on an edge too: a quarter pixel more in all.)
Size = tuple[int, int]  # Height and width.
WOODS = np.array([(222, 170, 110), (200, 135, 75), (170, 105, 50), (135, 75, 35), (190, 110, 60)])  # Tables.
GREENS = np.array([(74, 150, 60), (46, 110, 52), (126, 170, 60), (96, 130, 40), (58, 130, 80)])  # Plants.
PAINTS = np.array([(190, 50, 50), (220, 90, 120), (50, 90, 190), (90, 150, 220), (120, 60, 160)])  # Chairs.
BRASSES = np.array([(240, 215, 60), (225, 190, 40), (250, 235, 140), (205, 185, 50)])  # Lamps.
ROOMS = np.array([(232, 228, 220), (200, 200, 202), (150, 148, 145), (96, 96, 100), (60, 58, 60), (190, 165, 140)])


class Surface(NamedTuple):
    """Class, RGB colour in [0, 255] and texture of something drawn."""

    class_id: int
    colour: np.ndarray
    texture: int = PLAIN


class Part(NamedTuple):
    """A convex polygon, corners [N, 2] as (x, y) in pixels, and the light on it."""

    corners_xy: np.ndarray
    surface: Surface
    shade: float = 1.0


@dataclass(frozen=True)
class View:
    """How an object's own metres (x right, y up, z away from us, from its foot) become pixels."""

    vanishing_xy: tuple[float, float]  # Pixels.
    focal: float  # Pixels.
    eye: float  # Height of the camera above the floor, metres.
    fine: float  # Unit of thin parts' widths, pixels: 1 in a picture of 160 x 160.
    foot: tuple[float, float, float] = (0.0, 0.0, 0.0)  # Metres from the floor below the camera.
    yaw: float = 0.0
    size: float = 1.0

    @property
    def metre(self) -> float:
        """Pixels per metre of the object."""
        return self.size * self.focal / self.foot[2]

    def pixels(self, outline_xz, y: float) -> np.ndarray:
        """Projects points [..., 2] at the height `y`, in metres, to [..., 2] as (x, y) in pixels."""
        x, z = np.moveaxis(np.asarray(outline_xz) * self.size, -1, 0)
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        x, y, z = x * cos - z * sin + self.foot[0], y * self.size + self.foot[1], x * sin + z * cos + self.foot[2]
        scale = self.focal / np.maximum(z, 0.2)
        return np.stack([self.vanishing_xy[0] + scale * x, self.vanishing_xy[1] + scale * (self.eye - y)], -1)

    def point(self, x: float, y: float, z: float = 0.0) -> complex:
        """One point in metres as x + iy in pixels, for what is drawn flat: strokes and leaves."""
        return complex(*self.pixels((x, z), y))

    def thin(self, metres: float) -> float:
        """The width `metres` in pixels, kept between 3 and 4.5 fine pixels."""
        return float(np.clip(metres * self.metre, 3.0 * self.fine, 4.5 * self.fine))


def draw_scene(index: int, seed: int, size_hw: tuple[int, int] = (160, 160)) -> tuple[np.ndarray, np.ndarray]:
    """Draws scene number `index` of the series `seed`.

    A function of its arguments alone. Corners are rounded to fixed point and all that follows is integer arithmetic, so
    machines agree as far as NumPy's generator and OpenCV's filling and blurring do.

    Args:
      index, seed: 0 or more.
      size_hw: height and width in pixels. Everything scales with the shorter side; 160 is what it is meant for.

    Returns:
      image: RGB, uint8 [H, W, 3].
      labels: uint8 [H, W]: 0 background, 1 table, 2 chair, 3 plant, 4 lamp. No pixel is ignored.
    """
    rng = np.random.default_rng([seed, index])
    parts, shadows = compose(rng, size_hw)
    colours, labels, textures = rasterise(parts, size_hw)
    light = 220 + _smooth_noise(rng, (3, 3), size_hw) // 4  # Falls off across the room; 256 is one.
    light *= np.take_along_axis(draw_textures(rng, size_hw), textures[None], 0)[0]
    light = np.where(labels == BACKGROUND, light * draw_shadows(shadows, size_hw) >> 8, light)
    return np.clip(colours * light[..., None] >> 15, 0, 255).astype(np.uint8), labels


def rasterise(parts: list[Part], size_hw: Size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fills the parts in their order: later ones hide earlier ones.

    Returns the mean colours int32 [H, W, 3] in [0, 255], the labels uint8 [H, W] and the textures int [H, W].
    """
    numbers = np.zeros((size_hw[0] * SUPERSAMPLING, size_hw[1] * SUPERSAMPLING), np.uint16)
    for number, part in enumerate(parts):
        _fill(numbers, part.corners_xy * SUPERSAMPLING, number)
    colours = np.array([np.clip(part.surface.colour * part.shade, 0, 255) for part in parts])
    votes = np.eye(5)[[part.surface.class_id for part in parts]]
    samples = np.rint(np.concatenate([colours, votes], 1)).astype(np.uint16)[numbers]
    cells = [(y, x) for y in range(SUPERSAMPLING) for x in range(SUPERSAMPLING)]
    sums = sum(samples[y::SUPERSAMPLING, x::SUPERSAMPLING] for y, x in cells)
    centres = numbers[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]
    textures = np.array([part.surface.texture for part in parts])[centres]
    return sums[..., :3].astype(np.int32) // len(cells), sums[..., 3:].argmax(-1).astype(np.uint8), textures


def draw_textures(rng: Generator, size_hw: Size) -> np.ndarray:
    """All textures as factors, int32 [5, H, W]; 128 is one."""
    fine = max(1, min(size_hw) // 160)
    grains_yx = ((fine, 16 * fine), (16 * fine, fine), (3 * fine, 3 * fine))  # Across, upright, mottled.
    cells_hw = [(size_hw[0] // y + 1, size_hw[1] // x + 1) for y, x in grains_yx]
    woven = np.indices(size_hw).sum(0) // (2 * fine) % 2 * 12
    speckle = rng.integers(125, 132, size_hw)
    grains = [112 + _smooth_noise(rng, cells, size_hw) // 8 for cells in cells_hw]
    return np.stack([speckle, *grains, speckle - 6 + woven])


def draw_shadows(shadows: list[np.ndarray], size_hw: Size) -> np.ndarray:
    """Soft shadows on the floor as a factor, int32 [H, W]; 256 is one."""
    shade = np.zeros(size_hw, np.uint8)
    for corners_xy in shadows:
        _fill(shade, corners_xy, 100)
    return 256 - cv2.blur(shade, (max(3, min(size_hw) // 20 | 1),) * 2).astype(np.int32)


def compose(rng: Generator, size_hw: Size) -> tuple[list[Part], list[np.ndarray]]:
    """A room and three to five objects in it: parts far to near, and the corners of the shadows on the floor."""
    height, width = size_hw
    horizon = rng.uniform(-0.1, 0.2)
    floor_line = rng.uniform(horizon + 0.25, 0.5) * height
    vanishing_xy = (rng.uniform(0.3, 0.7) * width, horizon * height)
    view = View(vanishing_xy, focal=min(size_hw), eye=rng.uniform(1.3, 1.7), fine=min(size_hw) / 160)
    parts, behind = room(rng, view, size_hw, floor_line)
    kinds = [*(rng.permutation(4) + 1), rng.integers(1, 5)][: rng.integers(3, 6)]
    feet: list[complex] = []
    for kind in kinds:  # The candidate that is farthest from those that stand already.
        nearest = (1.2 if kind == TABLE else 0.98) * height
        candidates = [_foot(rng, view, width, floor_line + 0.05 * height, nearest) for _ in range(8)]
        feet.append(max(candidates, key=lambda foot: min([abs(foot - other) for other in feet], default=0)))
    shadows = []
    for at, kind in sorted(zip(feet, kinds, strict=True), key=lambda pair: -pair[0].imag):
        placed = replace(view, foot=(at.real, 0.0, at.imag), yaw=rng.uniform(0, 2 * np.pi), size=rng.uniform(0.75, 1.2))
        draw, shadow_radius = OBJECTS[kind]
        parts += draw(rng, placed, behind)
        shadows.append(placed.pixels(_ring(20, shadow_radius) + rng.uniform(-0.1, 0.1, 2), 0.0))
    return parts, shadows


def room(rng: Generator, view: View, size_hw: Size, floor_line: float) -> tuple[list[Part], list[np.ndarray]]:
    """Wall and floor with what hangs and lies there, all background; and the two colours to stand out from."""
    height, width = size_hw
    wall = Surface(BACKGROUND, tone(rng), rng.choice([PLAIN, MOTTLED, WOVEN, GRAIN_UPRIGHT]))
    floor = Surface(BACKGROUND, tone(rng, [wall.colour]), rng.choice([PLAIN, MOTTLED, WOVEN, GRAIN_ACROSS]))
    far, near = (view.focal * view.eye / (y - view.vanishing_xy[1]) for y in (floor_line, 1.2 * height))
    left, right = ((x - view.vanishing_xy[0]) * far / view.focal for x in (0, width))
    parts = [Part(_rectangle(width, height), floor)]
    style, board = rng.choice(["boards", "tiles", "bare"]), rng.uniform(0.2, 0.5)
    rows = {"boards": [(far, near)], "tiles": pairwise(np.arange(far, near, -board)), "bare": []}[style]
    for row, (start, end) in enumerate(rows):
        for x in np.arange(left - row % 2 * board, right, 2 * board):
            corners = [(x, start), (x + board, start), (x + board, end), (x, end)]
            parts.append(Part(view.pixels(corners, 0.0), floor, rng.uniform(0.84, 0.92)))
    parts.append(Part(_rectangle(width, floor_line), Surface(BACKGROUND, tone(rng))))  # Of this the skirting remains.
    parts.append(Part(_rectangle(width, floor_line - rng.uniform(1, 4) * view.fine), wall))
    for _ in range(rng.integers(0, 3)):  # Pictures.
        half, centre = rng.uniform(0.06, 0.15, 2) * min(size_hw), rng.uniform(0, (width, 0.6 * floor_line))
        parts.append(Part(_rectangle(*half) + centre, Surface(BACKGROUND, tone(rng, [wall.colour]))))
        parts.append(Part(_rectangle(*half - 2 * view.fine) + centre, Surface(BACKGROUND, tone(rng), MOTTLED)))
    if rng.random() < 0.3:  # A rug.
        foot = _foot(rng, view, width, floor_line * 1.1, height)
        placed = replace(view, foot=(foot.real, 0.0, foot.imag), yaw=rng.uniform(0, np.pi))
        rug = Surface(BACKGROUND, tone(rng, [floor.colour]), WOVEN)
        edge, inside = _rectangle(0.8, 0.5), _rectangle(0.7, 0.4)
        parts += [Part(placed.pixels(edge, 0.0), rug, 0.75), Part(placed.pixels(inside, 0.0), rug)]
    return parts, [wall.colour, floor.colour]


def table(rng: Generator, view: View, behind) -> list[Part]:
    """A top on four legs, or a round one on one leg; sometimes a plant or a lamp stands on it."""
    surface = Surface(TABLE, tone(rng, behind, WOODS), rng.choice([PLAIN, GRAIN_ACROSS]))
    height, thickness, half_x, half_z = rng.uniform((0.5, 0.035, 0.55, 0.4), (0.78, 0.06, 1.0, 0.6))
    leg = max(rng.uniform(0.05, 0.08), 1.8 * view.fine / view.metre) / 2
    if rng.random() < 0.3:
        top = _ring(24, half_z)
        parts = solid(view, surface, _ring(12, 0.3), _ring(12, 0.05), 0.0, 0.08)
        parts += solid(view, surface, _ring(8, leg), _ring(8, leg), 0.0, height)
    else:
        top, parts = _rectangle(half_x, half_z), []
        for corner in _rectangle(half_x - leg - 0.03, half_z - leg - 0.03):
            post = _rectangle(leg, leg) + corner
            parts += solid(view, surface, post, post, 0.0, height)
    parts += solid(view, surface, top, top, height - thickness, height)
    if rng.random() < 0.25:
        x, y, z = view.foot
        on_top = replace(view, foot=(x, y + height * view.size, z), size=view.size * 0.5)
        parts += (plant if rng.random() < 0.5 else lamp)(rng, on_top, [*behind, surface.colour])
    return parts


def chair(rng: Generator, view: View, behind) -> list[Part]:
    """Thin legs, a seat, and a back of upright slats or of rungs, with gaps that show what is behind."""
    frame = Surface(CHAIR, tone(rng, behind, PAINTS), rng.choice([PLAIN, GRAIN_UPRIGHT]))
    seat = frame if rng.random() < 0.5 else Surface(CHAIR, tone(rng, behind, PAINTS), WOVEN)
    half, height, top, cushion = rng.uniform((0.25, 0.42, 0.95, 0.06), (0.31, 0.52, 1.15, 0.14))
    leg = view.thin(0.045) / view.metre / 2.4  # Half a side; most are seen a little cornerwise.
    inner, splay, lean = half - leg, rng.uniform(1.0, 1.2), rng.uniform(0.0, 0.15)
    parts, post = [], _rectangle(leg, leg)
    for corner in _rectangle(inner, inner):
        parts += solid(view, frame, post + corner * splay, post + corner, 0.0, height)
    parts += solid(view, seat, _rectangle(half, half), _rectangle(half, half), height - cushion, height)

    def bar(x: float, half_x: float, lower: float, upper: float) -> list[Part]:  # Of the back, which leans away.
        foot, head = (_rectangle(half_x, leg) + (x, inner + lean * (y - height)) for y in (lower, upper))
        return solid(view, frame, foot, head, lower, upper)

    rail = top - max(rng.uniform(0.08, 0.2), 2.4 * leg)
    pitch = 11 * view.fine / view.metre  # Slats this close still show a gap.
    slats, rungs = int(np.clip(2 * inner / pitch, 1, 5)), int(np.clip((rail - height) / pitch, 1, 4))
    if rng.random() < 0.5:
        slats = 1
        for y in np.linspace(height, rail, rungs + 1)[1:-1]:
            parts += bar(0.0, inner, y - leg, y + leg)
    for x in np.linspace(-inner, inner, slats + 1):
        parts += bar(x, leg, height, top)
    return parts + bar(0.0, half, rail, top)


def plant(rng: Generator, view: View, behind) -> list[Part]:
    """A pot with either a shrub that branches into small leaves or a tuft of long bent blades."""
    pot, leaf = Surface(PLANT, tone(rng, behind, GREENS)), Surface(PLANT, tone(rng, behind, GREENS))
    radius, height, trunk = rng.uniform((0.15, 0.28, 0.26), (0.25, 0.45, 0.36))
    parts = solid(view, pot, _ring(14, radius * 0.75), _ring(14, radius), 0.0, height)
    root = view.point(0, height)
    if rng.random() < 0.65:
        return parts + branch(rng, view, leaf, root, -1j * trunk * view.metre, 4 if view.metre > 55 * view.fine else 3)
    for lean in np.linspace(-0.9, 0.9, rng.integers(6, 10)):
        step = -1j * np.exp(0.5j * lean) * rng.uniform(0.12, 0.2) * view.metre
        points = root + np.cumsum([0, *(step * np.exp(0.35j * lean * np.arange(6)))])
        widths = rng.uniform(0.06, 0.1) * view.metre * np.array([0.5, 1, 1, 1, 0.9, 0.7, 0.1])
        parts += [stroke(leaf, a, b, *w) for (a, b), w in zip(pairwise(points), pairwise(widths), strict=True)]
    return parts


def branch(rng: Generator, view: View, leaf: Surface, start: complex, step: complex, forks: int) -> list[Part]:
    """A twig from `start` along `step`, in pixels, that forks `forks` times and ends in leaves."""
    end, wood = start + step, leaf._replace(colour=leaf.colour * 0.6)
    parts = [stroke(wood, start, end, view.thin(0.012 * (forks + 1)), view.thin(0.012 * forks))]
    if forks < 3:
        length = np.clip(0.2 * view.metre, 7 * view.fine, 16 * view.fine) / abs(step)
        for turn in (-0.9, 0.9) if forks else (-0.9, 0.0, 0.9):
            along = step * length * np.exp(1j * (turn + rng.uniform(-0.3, 0.3)))
            lens = end + along * np.array([0, 0.3 + 0.3j, 0.7 + 0.25j, 1, 0.7 - 0.25j, 0.3 - 0.3j])
            parts.append(Part(_xy(lens), leaf))
    for side in ((-1, 1) if rng.random() < 0.7 else (-1, 0, 1)) if forks else ():
        turn = np.exp(1j * (side * rng.uniform(0.35, 0.75) + rng.uniform(-0.1, 0.1)))
        parts += branch(rng, view, leaf, end, step * turn * rng.uniform(0.65, 0.85), forks - 1)
    return parts


def lamp(rng: Generator, view: View, behind) -> list[Part]:
    """A shade on a thin pole, straight or bent over at its top, that stands on a disc or on three legs."""
    stand, cloth = Surface(LAMP, tone(rng, behind, BRASSES)), Surface(LAMP, tone(rng, behind, BRASSES))
    height, radius, tall, reach = rng.uniform((1.1, 0.22, 0.3, 0.35), (1.5, 0.36, 0.46, 0.55))
    width, neck, foot = view.thin(0.03), view.point(0, height), view.point(0, 0)
    if rng.random() < 0.4:
        foot = view.point(0, height * 0.55)
        legs = [view.point(0.3 * np.cos(a), 0, 0.3 * np.sin(a)) for a in (0.4, 2.5, 4.6)]
        parts = [stroke(stand, leg, foot, width, width) for leg in legs]
    else:
        parts = solid(view, stand, _ring(16, 0.16), _ring(16, 0.14), 0.0, 0.04)
    parts.append(stroke(stand, foot, neck, width, width))
    x, angles = rng.choice([-reach, 0.0, 0.0, reach]), np.linspace(0, np.pi, 9)
    arc = neck + view.metre / 2 * (x * (1 - np.cos(angles)) - 1j * abs(x) * np.sin(angles))
    parts += [stroke(stand, a, b, width, width) for a, b in pairwise(arc) if x]
    head = replace(view, foot=(view.foot[0] + x * view.size, *view.foot[1:]), yaw=0.0)
    lower, upper = _ring(16, radius), _ring(16, radius * rng.uniform(0.4, 0.9))
    return parts + solid(head, cloth, lower, upper, height - tall, height)


OBJECTS = {TABLE: (table, 0.6), CHAIR: (chair, 0.28), PLANT: (plant, 0.2), LAMP: (lamp, 0.2)}  # With shadows' radii.


def solid(view: View, surface: Surface, lower_xz, upper_xz, y_lower: float, y_upper: float) -> list[Part]:
    """The faces that we see of a convex solid between two level outlines [N, 2] with as many corners, in metres."""
    lower, upper = view.pixels(lower_xz, y_lower), view.pixels(upper_xz, y_upper)
    edges = np.roll(lower_xz, -1, 0) - lower_xz
    shades = 0.75 + 0.15 * np.cos(np.arctan2(edges[:, 1], edges[:, 0]) + view.yaw - 0.6)
    sides = np.stack([lower, np.roll(lower, -1, 0), np.roll(upper, -1, 0), upper], 1)
    faces = [Part(side, surface, shade) for side, shade in zip(sides, shades, strict=True)]
    faces += [Part(upper, surface, 1.05), Part(lower[::-1], surface, 0.6)]
    return [face for face in faces if cv2.contourArea(face.corners_xy.astype(np.float32), oriented=True) < 0]


def stroke(surface: Surface, start: complex, end: complex, width_start: float, width_end: float) -> Part:
    """A straight, tapering line; points as x + iy and widths in pixels."""
    across = 0.5j * (end - start) / abs(end - start)
    a, b = across * width_start, across * width_end
    return Part(_xy([start + a, end + b, end - b, start - a]), surface)


def tone(rng: Generator, behind=(), tones: np.ndarray = ROOMS) -> np.ndarray:
    """A colour that stands out from those behind: of six drawn, the one farthest from the nearest of them."""
    drawn = tones[rng.integers(len(tones), size=6)] + rng.integers(-14, 15, (6, 3))
    distances = [np.abs(drawn - colour).sum(-1) for colour in behind]
    return drawn[np.min(distances, 0).argmax() if distances else 0]


def _foot(rng: Generator, view: View, width: int, highest: float, lowest: float) -> complex:
    """A place on the floor, x + iz in metres, that is seen between two rows of the picture."""
    z = view.focal * view.eye / (rng.uniform(highest, lowest) - view.vanishing_xy[1])
    return complex((rng.uniform(0.04, 0.96) * width - view.vanishing_xy[0]) * z / view.focal, z)


def _smooth_noise(rng: Generator, cells_hw: Size, size_hw: Size) -> np.ndarray:
    noise = rng.integers(0, 256, cells_hw, dtype=np.uint8)
    return cv2.resize(noise, size_hw[::-1], interpolation=cv2.INTER_LINEAR_EXACT).astype(np.int32)


def _fill(canvas: np.ndarray, corners_xy: np.ndarray, value: int) -> None:
    corners = np.rint((corners_xy - 0.5) * (1 << FIXED_POINT_BITS)).astype(np.int32)
    cv2.fillConvexPoly(canvas, corners, value, cv2.LINE_8, FIXED_POINT_BITS)


def _ring(corners: int, radius: float) -> np.ndarray:
    return radius * _xy(np.exp(2j * np.pi * np.arange(corners) / corners))


def _rectangle(half_x: float, half_z: float) -> np.ndarray:
    return np.array([(half_x, half_z), (-half_x, half_z), (-half_x, -half_z), (half_x, -half_z)])


def _xy(points) -> np.ndarray:
    return np.stack([np.real(points), np.imag(points)], -1)
