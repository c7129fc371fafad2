"""Synthetic scenes: a small dataset that is generated, not stored, in which context decides.

Boats and cars look the same. They stand on the same gray pier, one at the left edge of the picture and one at the right. A
vehicle is a boat if a river comes down from the horizon in its half of the picture, at least 40 pixels away, and a car if a
road does. Half of the scenes have one of each, so it is not enough to know what the picture contains; a network has to know
where it is. This is the paper's argument for pooling over sub-regions (section 3.2). Sheep and boulders look the same, too: a
fence surrounds sheep, stones surround boulders. Poles are 2 or 3 pixels wide, and a bird has about 15 pixels.
"""

import numpy as np

from pspnet_jax.datasets import IGNORE
from pspnet_jax.errors import UserError

HEIGHT, WIDTH = 80, 192  # pixels
SPLITS = {"train": 2000, "validation": 200}  # number of scenes

SKY, WATER, GRASS, ROAD, PIER, BOAT, CAR, SHEEP, BOULDER, POLE, BIRD = range(11)  # in the order of the class table
VEHICLE, ROUND = BOAT, SHEEP  # until it is known which

# A scene is painted in materials: class; (R, G, B) at the top of the picture and what it would be at the bottom, linear
# between them; strength of the texture.
MATERIALS = {
    "sky": (SKY, (88, 146, 214), (620, 480, 300), 0.2),
    "cloud": (SKY, (250, 250, 252), (200, 214, 230), 0.5),
    "hill": (GRASS, (150, 184, 190), (20, 90, 50), 0.6),
    "grass": (GRASS, (176, 196, 110), (72, 128, 44), 1.5),
    "river": (WATER, (176, 212, 236), (0, 70, 150), 0.5),
    "ripple": (WATER, (206, 232, 246), (60, 130, 190), 0.5),
    "road": (ROAD, (136, 134, 136), (84, 84, 92), 0.8),
    "line": (ROAD, (226, 224, 214), (236, 234, 222), 0.5),
    "bank": (IGNORE, (186, 178, 128), (120, 108, 70), 1.0),
    "bush": (IGNORE, (86, 120, 70), (36, 82, 40), 2.0),
    "pier": (PIER, (196, 190, 180), (150, 144, 136), 0.8),
    "seam": (PIER, (150, 144, 134), (122, 116, 108), 0.8),
    "shadow": (PIER, (100, 96, 92), (84, 80, 78), 0.6),
    "hull 0": (VEHICLE, (196, 54, 46), (196, 54, 46), 0.8),
    "hull 1": (VEHICLE, (238, 238, 232), (238, 238, 232), 0.8),
    "hull 2": (VEHICLE, (38, 84, 150), (38, 84, 150), 0.8),
    "hull 3": (VEHICLE, (236, 178, 40), (236, 178, 40), 0.8),
    "hull 4": (VEHICLE, (40, 130, 110), (40, 130, 110), 0.8),
    "cabin": (VEHICLE, (226, 222, 212), (226, 222, 212), 0.6),
    "window": (VEHICLE, (52, 70, 92), (52, 70, 92), 0.5),
    "round": (ROUND, (226, 222, 212), (236, 232, 222), 0.8),
    "shade": (ROUND, (150, 146, 138), (160, 156, 148), 0.8),
    "fence": (IGNORE, (140, 100, 62), (92, 58, 30), 0.8),
    "stone": (IGNORE, (150, 148, 144), (112, 112, 112), 0.8),
    "pole": (POLE, (70, 64, 62), (46, 42, 40), 0.4),
    "lamp": (POLE, (255, 232, 160), (255, 232, 160), 0.2),
    "bird": (BIRD, (44, 42, 52), (44, 42, 52), 0.2),
}
HULLS = 5
_NUMBER = {name: number for number, name in enumerate(MATERIALS)}
_CLASS = np.array([material[0] for material in MATERIALS.values()], np.uint8)
_TOP, _BOTTOM, _TEXTURE = (np.array([material[i] for material in MATERIALS.values()], np.float32) for i in (1, 2, 3))

# Bilinear interpolation from 10 x 24 values to the picture, 7 gray levels strong.
_SMOOTH_Y = 7 * np.maximum(0, 1 - np.abs(np.linspace(0, 9, HEIGHT)[:, None] - np.arange(10))).astype(np.float32)
_SMOOTH_X = np.maximum(0, 1 - np.abs(np.linspace(0, 23, WIDTH) - np.arange(24)[:, None])).astype(np.float32)
_Y, _X = np.ogrid[:HEIGHT, :WIDTH]


def scene(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scene `index` of a split, the same whenever and wherever it is drawn: uint8[80,192,3] and uint8[80,192].

    Raises:
      UserError: there is no such scene.
    """
    if split not in SPLITS or not 0 <= index < SPLITS[split]:
        sizes = ", ".join(f"{name} 0..{size - 1}" for name, size in SPLITS.items())
        raise UserError(f"no scene {index} in split {split!r}: expected one of {sizes}")
    rng = np.random.default_rng([list(SPLITS).index(split), index])  # the split's number is its seed
    left, right = rng.integers(2, size=(2, 2)).astype(bool)
    return draw(rng, tuple(left), tuple(right))


def draw(rng: np.random.Generator, left: tuple[bool, bool], right: tuple[bool, bool]) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene, see `scene`. With the same random numbers, scenes differ only in what these choices decide.

    Args:
      rng: for everything else.
      left, right: for each half, whether it has a river and a boat (or a road and a car), and sheep (or boulders).
    """
    materials = np.full((HEIGHT, WIDTH), _NUMBER["sky"])
    horizon = int(rng.integers(17, 21))
    _draw_sky(rng, materials, horizon)
    _draw_land(rng, materials, horizon)
    halves = materials[:, : WIDTH // 2], materials[:, : WIDTH // 2 - 1 : -1]  # both from the edge of the picture to its middle
    for half, (water, _) in zip(halves, (left, right), strict=True):
        _draw_way(rng, half, horizon, water)
    _draw_pier(rng, materials)
    for half, (_, sheep) in zip(halves, (left, right), strict=True):
        _draw_meadow(rng, half, horizon, sheep)
    _draw_poles(rng, materials, horizon)
    labels = []
    for half, (water, sheep) in zip(halves, (left, right), strict=True):
        _draw_vehicle(rng, half)
        labels.append(_CLASS[half])
        labels[-1][labels[-1] == VEHICLE] = BOAT if water else CAR
        labels[-1][labels[-1] == ROUND] = SHEEP if sheep else BOULDER
    return _render(rng, materials), np.hstack((labels[0], labels[1][:, ::-1]))


def _draw_sky(rng: np.random.Generator, materials: np.ndarray, horizon: int) -> None:
    for _ in range(rng.integers(2, 5)):
        x, y = rng.uniform(0, WIDTH), rng.uniform(3, horizon - 9)
        for _ in range(4):
            dy, dx, ry, rx = rng.uniform((-1.5, -9, 1, 4), (1, 9, 2.6, 10))
            _ellipse(materials, "cloud", y + dy, x + dx, ry, rx)
    for _ in range(rng.integers(2, 6)):
        x, y = int(rng.integers(5, WIDTH - 6)), int(rng.integers(2, horizon - 8))
        wing = int(rng.integers(3, 5))  # a wing up, the body, a wing up: 7 or 9 pixels wide, 2 high
        for dx in range(-wing, wing + 1):
            top = y + 1 - (abs(dx) + 1) // 2
            materials[max(top, 0) : top + 2, x + dx] = _NUMBER["bird"]


def _draw_land(rng: np.random.Generator, materials: np.ndarray, horizon: int) -> None:
    waves = sum(rng.uniform(0.5, 2) * np.sin(_X / rng.uniform(6, 22) + rng.uniform(0, 6.3)) for _ in range(3))
    materials[:horizon][_Y[:horizon] + waves + 3 > horizon] = _NUMBER["hill"]
    materials[horizon:] = _NUMBER["grass"]
    for _ in range(rng.integers(3, 8)):
        y = rng.uniform(horizon + 3, 56)
        size = (y - horizon) / 16 + 1
        _ellipse(materials, "bush", y, rng.uniform(0, WIDTH), size, size * rng.uniform(1, 1.8))


def _draw_way(rng: np.random.Generator, half: np.ndarray, horizon: int, water: bool) -> None:
    """Draws a river or a road, near the middle of the picture: from the horizon to the pier, wider as it comes closer."""
    x = np.arange(WIDTH // 2)
    t = np.clip((_Y - horizon) / 40, 0, None)
    bend = rng.uniform(-3, 3) * np.sin(t * rng.uniform(4, 7))
    center = rng.uniform(76, 88) * (1 - t) + rng.uniform(80, 85) * t + bend * (1 - t)
    width = 1.5 + rng.uniform(6, 7.5) * t
    across = np.abs(x - center) / width
    across[:horizon] = np.inf
    half[across < 1 + 1.3 / width] = _NUMBER["bank"]
    half[across < 1] = _NUMBER["river" if water else "road"]
    if water:
        half[(across < 0.9) & (np.sin(x / 3 + 2 * _Y) > 0.8) & (_Y % 3 == 0)] = _NUMBER["ripple"]
    else:
        half[(across < 0.1) & (np.sin(24 * np.sqrt(t)) > -0.2)] = _NUMBER["line"]


def _draw_pier(rng: np.random.Generator, materials: np.ndarray) -> None:
    depth = _Y - 57 - rng.uniform(0, 3) - rng.uniform(-2, 2) * (_X / WIDTH - 0.5)
    materials[depth > 0] = _NUMBER["pier"]
    slabs = (_X - WIDTH / 2) / (depth + 40) * 8 + rng.uniform(0, 1)
    joints = (np.abs(depth % 8 - 4) < 0.5) | (np.abs(slabs % 1 - 0.5) < 0.04)
    materials[(depth > 0) & ((depth < 1.2) | joints)] = _NUMBER["seam"]


def _draw_meadow(rng: np.random.Generator, half: np.ndarray, horizon: int, sheep: bool) -> None:
    """Draws two to four sheep within a fence, or boulders within a ring of stones where the posts of the fence would be."""
    y, x, rx, ry = rng.uniform((horizon + 14, 24, 17, 9), (horizon + 18, 42, 21, 11))
    for angle in np.arange(0, 2 * np.pi, np.pi / 9) + rng.uniform(-0.08, 0.08, 18):
        row, column = int(y + ry * np.sin(angle)), int(x + rx * np.cos(angle))
        if sheep:
            half[row - 3 : row + 1, column : column + 2] = _NUMBER["fence"]
        else:
            half[row - 1 : row + 1, column - 1 : column + 3] = _NUMBER["stone"]
    for i in range(rng.integers(2, 5)):
        dy, dx = rng.uniform((-2.5, -1.5), (2.5, 1.5))
        _ellipse(half, "shade", y + dy + 0.8, x + dx + 8 * (i - 1), 2, 3)
        _ellipse(half, "round", y + dy, x + dx + 8 * (i - 1), 1.9, 2.9)


def _draw_poles(rng: np.random.Generator, materials: np.ndarray, horizon: int) -> None:
    for foot in np.sort(rng.uniform(horizon + 14, 74, rng.integers(2, 6))):
        x, near = int(rng.integers(3, WIDTH - 6)), (foot - horizon) / (HEIGHT - horizon)
        top, width = int(foot - 12 - 20 * near), 2 + int(near > 0.5)
        materials[top : int(foot), x : x + width] = _NUMBER["pole"]
        materials[top : top + 2, x - 1 : x + width + 1] = _NUMBER["lamp"]


def _draw_vehicle(rng: np.random.Generator, half: np.ndarray) -> None:
    """Draws a boat or a car at the edge of the picture, away from the river or road."""
    height, width, bottom = (int(n) for n in rng.integers((10, 17, 71), (15, 25, 78)))
    x = int(rng.integers(0, 28 - width))
    v, u = np.ogrid[0.5 / height : 1 : 1 / height, 0.5 / width - 0.5 : 0.5 : 1 / width]
    stern, cabin = rng.uniform(0.05, 0.2), rng.uniform(-0.12, 0.12)
    part = half[bottom - height : bottom, x : x + width]
    half[bottom, x + 1 : x + width - 1] = _NUMBER["shadow"]
    part[(v > 0.45) & (np.abs(u) < 0.5 - stern * (v - 0.45))] = _NUMBER[f"hull {rng.integers(HULLS)}"]
    part[(v <= 0.45) & (np.abs(u - cabin) < 0.2 + 0.25 * v)] = _NUMBER["cabin"]
    part[(v > 0.12) & (v < 0.4) & (np.abs(np.abs(u - cabin) - 0.12) < 0.08)] = _NUMBER["window"]


def _ellipse(materials: np.ndarray, name: str, y: float, x: float, ry: float, rx: float) -> None:
    top, left = max(int(y - ry), 0), max(int(x - rx), 0)
    window = np.s_[top : int(y + ry) + 2, left : int(x + rx) + 2]
    inside = ((_Y[window[0]] - y) / ry) ** 2 + ((_X[:, window[1]] - x) / rx) ** 2 < 1
    materials[window][inside] = _NUMBER[name]


def _render(rng: np.random.Generator, materials: np.ndarray) -> np.ndarray:
    """Colors the materials, with texture and in the light of some hour of the day: uint8[80,192,3]."""
    t = (_Y / HEIGHT).astype(np.float32)[..., None]
    color = _TOP[materials] + (_BOTTOM - _TOP)[materials] * t
    grain = 5 * rng.standard_normal((HEIGHT, WIDTH), np.float32)
    patches = _SMOOTH_Y @ rng.standard_normal((10, 24), np.float32) @ _SMOOTH_X
    color += ((grain + patches) * _TEXTURE[materials])[..., None]
    color *= rng.uniform((0.88, 0.88, 0.84), (1.08, 1.04, 1.04)).astype(np.float32)
    return np.clip(color, 0, 255).astype(np.uint8)
