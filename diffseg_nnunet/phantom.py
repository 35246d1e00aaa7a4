"""A synthetic CT of chest and abdomen, small enough to train on with two CPU cores in minutes.

It is made so that the questions this package is about can be asked of it: the kidneys look exactly alike, so only their
place in the body tells left from right; table, bowel, muscle and heart share the brightness of labelled organs; the
patient's size, the field of view, the spacing, the scanner's origin and a slight tilt differ from case to case.

Shapes are drawn in a patient frame in mm: x to the left, y to the back, z to the head, its origin in the middle of the
trunk at the height of the kidneys' upper poles.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from diffseg_nnunet import atomic
from diffseg_nnunet.errors import BadInputError

LABELS = {
    "background": 0,
    "spine": 1,
    "lungs": 2,
    "liver": 3,
    "spleen": 4,
    "left_kidney": 5,
    "right_kidney": 6,
    "aorta": 7,
}

AIR_HU, FAT_HU, MUSCLE_HU = -1000.0, -95.0, 55.0

Mask = NDArray[np.bool_]
Array = NDArray[np.float64]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class PhantomSettings:
    """How the cases differ; every pair is a range that is drawn from evenly.

    Attributes:
        in_plane_mm: voxel spacing along x and y.
        slice_mm: voxel spacing along z.
        bottom_mm: the lowest slice, in the patient frame.
        top_mm: the highest slice; given way to `voxels` where both cannot be had.
        voxels: least and most voxels along any axis.
        size: scale of the patient, drawn for each axis.
        shift_mm: largest displacement of an organ along each axis.
        bend_mm: largest displacement by the smooth deformation of the whole body.
        tilt_share: share of cases whose image axes are turned against the patient's.
        tilt_degrees: largest such turn.
        blur_voxels: standard deviation of the blur.
        noise_hu: standard deviation of the noise.
    """

    in_plane_mm: tuple[float, float] = (6.8, 7.8)
    slice_mm: tuple[float, float] = (5.5, 8.0)
    bottom_mm: tuple[float, float] = (-175.0, -120.0)
    top_mm: tuple[float, float] = (140.0, 230.0)
    voxels: tuple[int, int] = (40, 56)
    size: tuple[float, float] = (0.9, 1.08)
    shift_mm: float = 7.0
    bend_mm: float = 5.0
    tilt_share: float = 0.25
    tilt_degrees: float = 4.0
    blur_voxels: float = 0.45
    noise_hu: tuple[float, float] = (12.0, 25.0)


def phantom_case(seed: int, settings: PhantomSettings | None = None) -> tuple[sitk.Image, sitk.Image]:
    """One synthetic CT and its label map, the same for the same seed.

    Args:
        seed: any integer >= 0.
        settings: how cases differ; None: the default.

    Returns:
        The image (int16, about Hounsfield units) and the label map (uint8, `LABELS`), on one grid of 40 to 56 voxels
        along each axis.
    """
    settings = settings or PhantomSettings()
    rng = np.random.default_rng(seed)
    grid = _Grid(rng, settings)
    canvas = _Canvas(grid.patient_frame(rng, settings))
    _draw_body(canvas, rng)
    _draw_chest(canvas, rng, settings)
    _draw_abdomen(canvas, rng, settings)
    _draw_spine_and_vessels(canvas, rng)
    _draw_table(canvas, grid)
    hu = gaussian_filter(canvas.hu + _texture(rng, canvas.hu), settings.blur_voxels)
    hu = hu + rng.normal(0, rng.uniform(*settings.noise_hu), hu.shape)
    return grid.image(hu.clip(-1024, 2000).round().astype(np.int16)), grid.image(canvas.labels)


def write_phantom(folder: Path | str, labelled: int = 12, unlabelled: int = 12, test: int = 4, seed: int = 0) -> None:
    """Write a small data set as plain folders, as a hospital might hand it over.

    ``images/`` and ``labels/`` are paired by file name, as are ``test_images/`` and ``test_labels/``;
    ``unlabelled_images/`` has images only; ``labels.json`` maps label names to numbers. No case is in two of them.

    Args:
        folder: is created; must not exist or be empty.
        labelled, unlabelled, test: numbers of cases.
        seed: other seeds give other patients.

    Raises:
        BadInputError: the folder holds something, or a number is negative.
    """
    folder = Path(folder)
    if min(labelled, unlabelled, test, seed) < 0:
        raise BadInputError("Numbers of cases and the seed cannot be negative.", "Give 0 or more.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInputError(f"{folder} holds something already.", "Remove it or choose another folder.")
    if folder.exists():
        folder.rmdir()
    parts = [
        ("images", "labels", labelled),
        ("unlabelled_images", None, unlabelled),
        ("test_images", "test_labels", test),
    ]
    seeds = np.random.SeedSequence(seed).generate_state(labelled + unlabelled + test)
    number = 0
    with atomic.new_folder(folder) as partial:
        for images, labels, count in parts:
            for name in filter(None, (images, labels)):
                (partial / name).mkdir()
            for _ in range(count):
                image, label = phantom_case(int(seeds[number]))
                file_name = f"phantom_{number:03d}.nii.gz"
                sitk.WriteImage(image, partial / images / file_name, useCompression=True)
                if labels:
                    sitk.WriteImage(label, partial / labels / file_name, useCompression=True)
                number += 1
        atomic.write_json(partial / "labels.json", LABELS)


class _Grid:
    """Spacing, size, origin and direction of a case; arrays are indexed z, y, x."""

    def __init__(self, rng: np.random.Generator, settings: PhantomSettings):
        least, most = settings.voxels
        in_plane, self.spacing_z = rng.uniform(*settings.in_plane_mm), rng.uniform(*settings.slice_mm)
        self.spacing = np.array([in_plane, in_plane, self.spacing_z])
        self.bottom, top = rng.uniform(*settings.bottom_mm), rng.uniform(*settings.top_mm)
        wanted_mm = np.array([rng.uniform(390, 410), rng.uniform(300, 325), top - self.bottom])
        self.size = np.clip(np.round(wanted_mm / self.spacing), least, most).astype(int)
        self.direction = np.eye(3)
        if rng.random() < settings.tilt_share:
            self.direction = Rotation.from_euler(
                "xyz", rng.uniform(-1, 1, 3) * settings.tilt_degrees, degrees=True
            ).as_matrix()
        # the middle of the trunk lies somewhere near the middle of the field of view, and anywhere in the scanner
        self.middle_mm = np.array([*rng.uniform(-6, 6, 2), self.bottom + self.size[2] * self.spacing_z / 2])
        self.scanner_mm = rng.uniform(-200, 200, 3)

    def from_middle(self) -> list[Array]:
        """Position of each voxel in the patient's directions, mm from the middle of the field of view: x, y, z."""
        steps = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(self.size, self.spacing, strict=True)]
        z, y, x = np.meshgrid(*steps[::-1], indexing="ij")
        return list(np.tensordot(self.direction, np.stack([x, y, z]), axes=1))

    def patient_frame(self, rng: np.random.Generator, settings: PhantomSettings) -> list[Array]:
        """Position of each voxel in the patient frame, after this patient's size and shape: x, y, z in mm."""
        positions = [p + offset for p, offset in zip(self.from_middle(), self.middle_mm, strict=True)]
        scaled = [p / rng.uniform(*settings.size) for p in positions]
        bent = []
        for axis, position in enumerate(scaled):
            along = scaled[(axis + rng.integers(1, 3)) % 3]
            bend = (
                settings.bend_mm * rng.uniform(-1, 1) * np.sin(along / rng.uniform(60, 110) + rng.uniform(0, 2 * np.pi))
            )
            bent.append(position + bend)
        return bent

    def image(self, array: NDArray) -> sitk.Image:
        """`array` (z, y, x) on this grid."""
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(self.spacing.tolist())
        image.SetDirection(self.direction.ravel().tolist())
        half = self.direction @ ((self.size - 1) / 2 * self.spacing)
        image.SetOrigin((self.scanner_mm + self.middle_mm - half).tolist())
        return image


class _Canvas:
    """Brightness (HU) and labels; what is drawn later lies on top."""

    def __init__(self, frame: list[Array]):
        self.x, self.y, self.z = frame
        self.hu = np.full(self.x.shape, AIR_HU)
        self.labels = np.zeros(self.x.shape, dtype=np.uint8)

    def draw(self, mask: Mask, hu: float, label: str = "background") -> None:
        self.hu[mask] = hu
        self.labels[mask] = LABELS[label]

    def ellipsoid(self, centre: Triple, semi_axes: Triple, turn_degrees: float = 0.0) -> Mask:
        """`turn_degrees` turns its upper end to the patient's left."""
        x, y, z = (p - c for p, c in zip((self.x, self.y, self.z), centre, strict=True))
        cos, sin = np.cos(np.deg2rad(turn_degrees)), np.sin(np.deg2rad(turn_degrees))
        x, z = cos * x - sin * z, sin * x + cos * z
        a, b, c = semi_axes
        return (x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 <= 1

    def column(self, x: float | Array, y: float | Array, semi_x: float, semi_y: float) -> Mask:
        """A vertical tube of elliptic section; its middle may depend on z."""
        return ((self.x - x) / semi_x) ** 2 + ((self.y - y) / semi_y) ** 2 <= 1

    def trunk(self, rim_mm: float) -> Mask:
        """The trunk, less a rim: an ellipse that is rounder in the chest and wider at the hips, flattened behind."""
        width = 158 + 8 * np.cos((self.z + 150) / 70) - rim_mm
        depth = np.where(self.y > 0, 104, 112) + 8 * np.tanh(self.z / 80) - rim_mm
        return np.abs(self.x / width) ** 2.3 + np.abs(self.y / depth) ** 2.3 <= 1

    def above_diaphragm(self) -> Mask:
        """Two domes, the right one higher, that fall to the back and to the sides."""
        height = 62 - 14 * np.tanh(self.x / 50) - 0.0042 * (np.abs(self.x) - 70) ** 2 - 0.006 * (self.y + 25) ** 2
        return self.z > height


def _draw_body(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Fat rim, muscle wall, the fat between the bowels; hip bones where the field of view reaches them."""
    rim = rng.uniform(10, 22)
    canvas.draw(canvas.trunk(0), FAT_HU)
    canvas.draw(canvas.trunk(rim), MUSCLE_HU)
    canvas.draw(canvas.trunk(rim + 16) & (canvas.y < 62), FAT_HU)
    for side in (-1, 1):
        wing = canvas.ellipsoid((side * 78, 25, -165), (55, 50, 60)) & ~canvas.ellipsoid(
            (side * 70, 12, -155), (50, 47, 62)
        )
        canvas.draw(wing & canvas.trunk(rim + 6) & (canvas.z < -105), 380)
        canvas.draw(canvas.column(side * 40, 48, 20, 18) & (canvas.z < 10), MUSCLE_HU)  # psoas


def _draw_chest(canvas: _Canvas, rng: np.random.Generator, settings: PhantomSettings) -> None:
    """Ribs, lungs and heart."""
    chest = canvas.above_diaphragm()
    wall = canvas.trunk(24) & ~canvas.trunk(33) & (canvas.z > -5)
    stripes = np.sin((canvas.z + 0.35 * canvas.y) / 30 * 2 * np.pi + rng.uniform(0, 6)) > 0.35
    canvas.draw(wall & stripes & (canvas.y > -90), 320)
    inner = canvas.trunk(33) & chest
    canvas.draw(inner, MUSCLE_HU)
    lungs = inner & ~canvas.column(0, 10, 26, 140)
    canvas.draw(lungs, rng.uniform(-860, -780), "lungs")
    vessels = gaussian_filter(rng.normal(size=canvas.hu.shape), 0.9)
    canvas.draw(lungs & (vessels > 2.1 * vessels.std()), rng.uniform(-450, -300), "lungs")
    heart = canvas.ellipsoid((24 + _shift(rng, settings), -38, 108), (52, 46, 54), 20) & chest
    canvas.draw(heart, rng.uniform(100, 180))


def _draw_abdomen(canvas: _Canvas, rng: np.random.Generator, settings: PhantomSettings) -> None:
    """Bowel, stomach, liver, spleen, kidneys."""
    cavity = canvas.trunk(30) & ~canvas.above_diaphragm()
    contrast = rng.uniform(0, 1)  # of the veins: early to late
    for _ in range(int(rng.integers(26, 36))):
        centre = (rng.uniform(-95, 95), rng.uniform(-80, 10), rng.uniform(-180, 0))
        semi_axes = tuple(rng.uniform(12, 27, 3))
        hu = rng.choice([-650.0, 25.0, 45.0, 160.0], p=[0.12, 0.4, 0.4, 0.08])
        canvas.draw(canvas.ellipsoid(centre, semi_axes, rng.uniform(-60, 60)) & cavity, hu)

    def place(x: float, y: float, z: float) -> Triple:
        return x + _shift(rng, settings), y + _shift(rng, settings), z + _shift(rng, settings)

    stomach = place(50, -35, 22)
    canvas.draw(canvas.ellipsoid(stomach, (42, 36, 34), -25) & cavity, rng.uniform(15, 45))
    gas = canvas.ellipsoid(stomach, (34, 28, 27), -25) & (canvas.y < stomach[1] - 8)
    canvas.draw(gas & cavity, -700)
    right_lobe = canvas.ellipsoid(place(-72, -8, 10), (78, 84, 82), -12)
    left_lobe = canvas.ellipsoid(place(-5, -52, 32), (70, 38, 34), -18)
    canvas.draw((right_lobe | left_lobe) & cavity, 85 + 40 * contrast, "liver")
    canvas.draw(canvas.ellipsoid(place(-55, -58, -42), (15, 20, 22)) & cavity, 8)  # gall bladder
    spleen = canvas.ellipsoid(place(106, 30, 20), (34, 48, 52), 15) & ~canvas.ellipsoid(stomach, (46, 40, 40))
    canvas.draw(spleen & cavity, 95 + 50 * contrast, "spleen")
    # one brightness and one distribution of sizes and places, mirrored: nothing but the side tells the kidneys apart
    kidney_hu = 150 + 50 * contrast
    for side, label in ((1, "left_kidney"), (-1, "right_kidney")):
        semi_axes = (rng.uniform(25, 30), rng.uniform(23, 28), rng.uniform(46, 56))
        x, y, z = (_shift(rng, settings) for _ in range(3))
        centre, turn = (side * (72 + x), 46 + y, -42 + z), -side * rng.uniform(5, 20)
        canvas.draw(canvas.ellipsoid(centre, tuple(1.3 * a for a in semi_axes), turn) & canvas.trunk(30), FAT_HU)
        canvas.draw(canvas.ellipsoid(centre, semi_axes, turn) & canvas.trunk(28), kidney_hu, label)


def _draw_spine_and_vessels(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Vertebrae with discs, the spinal canal, the aorta before and left of them, the vena cava on the right."""
    bow = 8 * np.sin((canvas.z + 60) / 75)
    body = canvas.column(0, 58 + bow, 23, 19)
    arch = canvas.column(0, 84 + bow, 26, 11) | (canvas.column(0, 92 + bow, 7, 20))
    discs = np.cos(canvas.z / 34 * 2 * np.pi + rng.uniform(0, 6)) > 0.8
    canvas.draw((body | arch) & canvas.trunk(4), rng.uniform(240, 330), "spine")
    canvas.draw(body & discs, 95, "spine")
    canvas.draw(canvas.column(0, 81 + bow, 8, 7), 25)
    contrast = rng.uniform(130, 230)
    middle = 14 + 4 * np.sin(canvas.z / 90) + rng.uniform(-3, 3)
    canvas.draw(canvas.column(middle, 27 + bow, 14, 14) & (canvas.z > -125), contrast, "aorta")
    canvas.draw(canvas.column(-24, 28 + bow, 14, 12) & (canvas.z < 55), 0.5 * contrast + 50)


def _draw_table(canvas: _Canvas, grid: _Grid) -> None:
    """A shallow trough behind the patient; it belongs to the scanner, so it does not bend with the body."""
    x, y, _ = grid.from_middle()
    surface = 112 - 0.0009 * x**2
    table = (np.abs(x) < 190) & (y > surface + 4) & (y < surface + 22) & (canvas.hu == AIR_HU)
    canvas.draw(table, -250)


def _texture(rng: np.random.Generator, hu: Array) -> Array:
    """Patchy tissue: +-6 HU within the body, over some voxels."""
    patches = gaussian_filter(rng.normal(size=hu.shape), 1.5)
    return np.where(hu > -300, 6 * patches / patches.std(), 0)


def _shift(rng: np.random.Generator, settings: PhantomSettings) -> float:
    return float(rng.uniform(-1, 1) * settings.shift_mm)
