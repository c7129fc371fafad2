"""Synthetic scenes: a small dataset that is drawn, not stored.

Boats and cars are drawn alike, and stand on the same gray pier at the bottom. The only clue to which they are winds to the
horizon, at least 40 pixels from them: a river, or a road. It is the case of the paper's figure 2, where a network without
context takes a boat on the river for a car. Poles are 1 or 2 pixels wide, birds 3 or 5 pixels in all.
"""

import numpy as np

from pspnet_jax.datasets import IGNORE
from pspnet_jax.errors import UserError

HEIGHT, WIDTH = 96, 128  # pixels
SPLITS = {"train": 2000, "validation": 200}  # number of scenes

SKY, WATER, GRASS, ROAD, PIER, BOAT, CAR, POLE, BIRD = range(9)  # in the order of the class table
VEHICLE = BOAT  # until it is known which

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
    "pole": (POLE, (70, 64, 62), (46, 42, 40), 0.4),
    "lamp": (POLE, (255, 232, 160), (255, 232, 160), 0.2),
    "bird": (BIRD, (44, 42, 52), (44, 42, 52), 0.2),
}
HULLS = 5
_NUMBER = {name: number for number, name in enumerate(MATERIALS)}
_CLASS = np.array([material[0] for material in MATERIALS.values()], np.uint8)
_TOP, _BOTTOM, _TEXTURE = (np.array([material[i] for material in MATERIALS.values()], np.float32) for i in (1, 2, 3))

# Bilinear interpolation from 12 x 16 values to the picture, 7 gray levels strong.
_SMOOTH_Y = 7 * np.maximum(0, 1 - np.abs(np.linspace(0, 11, HEIGHT)[:, None] - np.arange(12))).astype(np.float32)
_SMOOTH_X = np.maximum(0, 1 - np.abs(np.linspace(0, 15, WIDTH) - np.arange(16)[:, None])).astype(np.float32)
_Y, _X = np.ogrid[:HEIGHT, :WIDTH]


def scene(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scene `index` of a split, the same whenever and wherever it is drawn: uint8[96,128,3] and uint8[96,128].

    Raises:
      UserError: there is no such scene.
    """
    if split not in SPLITS or not 0 <= index < SPLITS[split]:
        sizes = ", ".join(f"{name} 0..{size - 1}" for name, size in SPLITS.items())
        raise UserError(f"no scene {index} in split {split!r}: expected one of {sizes}")
    rng = np.random.default_rng([list(SPLITS).index(split), index])  # the split's number is its seed
    return draw(rng, water=bool(rng.integers(2)))


def draw(rng: np.random.Generator, water: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene with a river and boats, or with a road and cars, which are otherwise the same: as `scene`."""
    materials = np.full((HEIGHT, WIDTH), _NUMBER["sky"])
    horizon = int(rng.integers(20, 25))
    _draw_sky(rng, materials, horizon)
    _draw_land(rng, materials, horizon)
    _draw_way(rng, materials, horizon, water)
    _draw_pier(rng, materials)
    _draw_poles(rng, materials, horizon)
    _draw_vehicles(rng, materials)
    if rng.random() < 0.5:
        materials = materials[:, ::-1]
    label = _CLASS[materials]
    label[label == VEHICLE] = BOAT if water else CAR
    return _render(rng, materials), label


def _draw_sky(rng: np.random.Generator, materials: np.ndarray, horizon: int) -> None:
    for _ in range(rng.integers(1, 4)):
        x, y = rng.uniform(0, WIDTH), rng.uniform(3, horizon - 9)
        for _ in range(4):
            dy, dx, ry, rx = rng.uniform((-1.5, -9, 1, 4), (1, 9, 2.6, 10))
            _ellipse(materials, "cloud", y + dy, x + dx, ry, rx)
    for _ in range(rng.integers(2, 7)):
        x, y = int(rng.integers(2, WIDTH - 4)), int(rng.integers(1, horizon - 8))
        wing = int(rng.integers(1, 3))  # a wing up, the body, a wing up: 3 or 5 pixels
        for dx in range(-wing, wing + 1):
            materials[y + 1 - (abs(dx) + 1) // 2, x + dx] = _NUMBER["bird"]


def _draw_land(rng: np.random.Generator, materials: np.ndarray, horizon: int) -> None:
    waves = sum(rng.uniform(0.5, 2) * np.sin(_X / rng.uniform(6, 22) + rng.uniform(0, 6.3)) for _ in range(3))
    materials[:horizon][_Y[:horizon] + waves + 3 > horizon] = _NUMBER["hill"]
    materials[horizon:] = _NUMBER["grass"]
    for _ in range(rng.integers(2, 6)):
        y = rng.uniform(horizon + 4, 68)
        size = (y - horizon) / 16 + 1
        _ellipse(materials, "bush", y, rng.uniform(0, WIDTH), size, size * rng.uniform(1, 1.8))


def _draw_way(rng: np.random.Generator, materials: np.ndarray, horizon: int, water: bool) -> None:
    """The river or road: from the horizon to the left side, wider as it comes near."""
    t = np.clip((_Y - horizon) / 30, 0, None)
    bend = rng.uniform(-3, 3) * np.sin(t * rng.uniform(4, 7))
    start = rng.uniform(36, 64)
    center = start - (start + 20) * t ** rng.uniform(0.9, 1.1) + bend
    half = 3 + rng.uniform(26, 34) * t
    across = np.abs(_X - center) / half
    across[:horizon] = np.inf
    materials[across < 1 + 1.3 / half] = _NUMBER["bank"]
    materials[across < 1] = _NUMBER["river" if water else "road"]
    if water:
        materials[(across < 0.9) & (np.sin(_X / 3 + 2 * _Y) > 0.8) & (_Y % 3 == 0)] = _NUMBER["ripple"]
    else:
        materials[(across < 0.06) & (np.sin(24 * np.sqrt(t)) > -0.2)] = _NUMBER["line"]


def _draw_pier(rng: np.random.Generator, materials: np.ndarray) -> None:
    depth = _Y - 70 - rng.uniform(0, 3) - rng.uniform(-2, 2) * (_X / WIDTH - 0.5)
    materials[depth > 0] = _NUMBER["pier"]
    slabs = (_X - WIDTH / 2) / (depth + 40) * 8 + rng.uniform(0, 1)
    joints = (np.abs(depth % 8 - 4) < 0.5) | (np.abs(slabs % 1 - 0.5) < 0.04)
    materials[(depth > 0) & ((depth < 1.2) | joints)] = _NUMBER["seam"]


def _draw_poles(rng: np.random.Generator, materials: np.ndarray, horizon: int) -> None:
    for foot in np.sort(rng.uniform(horizon + 12, 88, rng.integers(1, 5))):
        x, near = int(rng.integers(3, WIDTH - 5)), (foot - horizon) / (HEIGHT - horizon)
        top, width = int(foot - 10 - 28 * near), 1 + int(near > 0.5)
        materials[top : int(foot), x : x + width] = _NUMBER["pole"]
        materials[top : top + 2, x - 1 : x + width + 1] = _NUMBER["lamp"]


def _draw_vehicles(rng: np.random.Generator, materials: np.ndarray) -> None:
    """One to three in a row on the right, away from river or road."""
    x = 60 + int(rng.integers(0, 12))
    for _ in range(rng.integers(1, 4)):
        height, width, bottom = (int(n) for n in rng.integers((11, 18, 90), (16, 28, 95)))
        if x + width > WIDTH:
            break
        v, u = np.ogrid[0.5 / height : 1 : 1 / height, 0.5 / width - 0.5 : 0.5 : 1 / width]
        stern, cabin = rng.uniform(0.05, 0.2), rng.uniform(-0.12, 0.12)
        part = materials[bottom - height : bottom, x : x + width]
        materials[bottom, x + 1 : x + width - 1] = _NUMBER["shadow"]
        part[(v > 0.45) & (np.abs(u) < 0.5 - stern * (v - 0.45))] = _NUMBER[f"hull {rng.integers(HULLS)}"]
        part[(v <= 0.45) & (np.abs(u - cabin) < 0.2 + 0.25 * v)] = _NUMBER["cabin"]
        part[(v > 0.12) & (v < 0.4) & (np.abs(np.abs(u - cabin) - 0.12) < 0.08)] = _NUMBER["window"]
        x += width + int(rng.integers(2, 8))


def _ellipse(materials: np.ndarray, name: str, y: float, x: float, ry: float, rx: float) -> None:
    top, left = max(int(y - ry), 0), max(int(x - rx), 0)
    window = np.s_[top : int(y + ry) + 2, left : int(x + rx) + 2]
    inside = ((_Y[window[0]] - y) / ry) ** 2 + ((_X[:, window[1]] - x) / rx) ** 2 < 1
    materials[window][inside] = _NUMBER[name]


def _render(rng: np.random.Generator, materials: np.ndarray) -> np.ndarray:
    """Colors the materials, with texture and in the light of some hour of the day: uint8[96,128,3]."""
    t = (_Y / HEIGHT).astype(np.float32)[..., None]
    color = _TOP[materials] + (_BOTTOM - _TOP)[materials] * t
    grain = 5 * rng.standard_normal((HEIGHT, WIDTH), np.float32)
    patches = _SMOOTH_Y @ rng.standard_normal((12, 16), np.float32) @ _SMOOTH_X
    color += ((grain + patches) * _TEXTURE[materials])[..., None]
    color *= rng.uniform((0.88, 0.88, 0.84), (1.08, 1.04, 1.04)).astype(np.float32)
    return np.clip(color, 0, 255).astype(np.uint8)
