"""Training pictures are changed exactly as torchvision changes them, by the sample's own generator and without torch."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from eagleray.config.load import build_job
from eagleray.config.schema import AugmentConfig, ColorJitterConfig, PolicyConfig
from eagleray.data.augment import OPERATIONS, alter, draw_erased_box, draw_jitter, draw_policy
from eagleray.data.transforms import Preprocessing, decode_train, normalize
from eagleray.errors import ConfigError

PHOTO = load_sample_image("china.jpg")  # uint8 [427, 640, 3]
JPEG = cv2.imencode(".jpg", cv2.cvtColor(PHOTO, cv2.COLOR_RGB2BGR))[1].tobytes()
SIZE = 96
TRIVIALAUGMENT = PolicyConfig(name="trivialaugment")
ALL_ON = AugmentConfig(
    vertical_flip=0.5,
    policy=PolicyConfig(name="randaugment"),
    color_jitter=ColorJitterConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    erase=0.5,
)


def train_picture(config: AugmentConfig, sample: int, out: np.ndarray | None = None) -> np.ndarray:
    return decode_train(JPEG, (640, 427), config, SIZE, np.random.default_rng([1, 2, sample]), out)


class Recording(v2.Transform):
    """Mixed into one of torchvision's policies: keeps what it draws and leaves the picture alone."""

    def _apply_image_or_video_transform(self, image: Any, transform_id: str, magnitude: float, **_: Any) -> Any:
        self.drawn.append((transform_id, magnitude))
        return image


class RecordingRandAugment(Recording, v2.RandAugment):
    drawn: list[tuple[str, float]]


class RecordingTrivialAugment(Recording, v2.TrivialAugmentWide):
    drawn: list[tuple[str, float]]


def rounded(change: tuple[str, float]) -> tuple[str, float]:
    """Torchvision rounds the bits of Posterize when it draws them, ours rounds when it applies them."""
    name, magnitude = change
    return (name, round(magnitude)) if name == "Posterize" else change


def assert_alike(ours: list[Any], theirs: list[Any]) -> None:
    """Same outcomes, and counts that may come from the same distribution (chi-square)."""
    counts = Counter(ours), Counter(theirs)
    assert counts[0].keys() == counts[1].keys()
    assert chi2_contingency([[count[key] for key in counts[0]] for count in counts]).pvalue > 0.001


@pytest.mark.parametrize("policy", [v2.RandAugment(), v2.TrivialAugmentWide()], ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("size", [8, 97, 224])
def test_every_operation_gives_torchvisions_pixels(policy: Any, size: int) -> None:
    """Bit for bit, at every magnitude of the policy's space and both signs."""
    picture = Image.fromarray(cv2.resize(PHOTO, (size, size)))
    for name, (magnitudes, is_signed) in policy._AUGMENTATION_SPACE.items():
        values = magnitudes(31, size, size)
        for value in [0.0] if values is None else values[:: 1 if size < 200 else 5].tolist():
            for magnitude in (value, -value) if is_signed else (value,):
                theirs = policy._apply_image_or_video_transform(
                    picture, name, magnitude, interpolation=policy.interpolation, fill=policy._fill
                )
                assert (np.asarray(OPERATIONS[name](picture, magnitude)) == np.asarray(theirs)).all(), (name, magnitude)


@pytest.mark.parametrize(("size", "magnitude"), [(224, 9), (96, 17), (32, 0), (8, 30)])
def test_randaugment_draws_what_torchvision_draws(size: int, magnitude: int) -> None:
    """Operation, sign and magnitude to the last bit."""
    policy = PolicyConfig(name="randaugment", num_ops=3, magnitude=magnitude)
    rng = np.random.default_rng(0)
    ours = [change for _ in range(2000) for change in draw_policy(policy, size, rng)]
    torch.manual_seed(0)
    transform, picture = RecordingRandAugment(num_ops=3, magnitude=magnitude), Image.new("RGB", (size, size))
    transform.drawn = []
    for _ in range(2000):
        transform(picture)
    assert len(ours) == len(transform.drawn) == 6000
    assert_alike([rounded(change) for change in ours], [rounded(change) for change in transform.drawn])


def test_trivialaugment_draws_what_torchvision_draws() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_policy(TRIVIALAUGMENT, 224, rng) for _ in range(20_000)]
    assert all(len(changes) == 1 for changes in drawn)
    torch.manual_seed(0)
    transform, picture = RecordingTrivialAugment(), Image.new("RGB", (224, 224))
    transform.drawn = []
    for _ in range(20_000):
        transform(picture)
    ours, theirs = [rounded(changes[0]) for changes in drawn], [rounded(change) for change in transform.drawn]
    assert_alike(ours, theirs)
    # Each on its own as well, which shows a smaller difference.
    assert_alike([name for name, _ in ours], [name for name, _ in theirs])
    assert_alike([np.sign(magnitude) for _, magnitude in ours], [np.sign(magnitude) for _, magnitude in theirs])


def test_a_policy_applies_what_it_draws_in_order() -> None:
    config = AugmentConfig(policy=PolicyConfig(name="randaugment", num_ops=3, magnitude=15))
    assert config.policy is not None
    image = cv2.resize(PHOTO, (SIZE, SIZE))
    for seed in range(20):
        expected: Any = Image.fromarray(image)
        for name, magnitude in draw_policy(config.policy, SIZE, np.random.default_rng(seed)):
            expected = v2.RandAugment()._apply_image_or_video_transform(expected, name, magnitude, interpolation="nearest", fill={})
        changed = image.copy()
        alter(changed, config, np.random.default_rng(seed))
        assert (changed == np.asarray(expected)).all()


JITTER_FUNCTIONS = {"Brightness": F.adjust_brightness, "Contrast": F.adjust_contrast, "Color": F.adjust_saturation}


def test_colour_jitter_gives_torchvisions_pixels() -> None:
    config = AugmentConfig(color_jitter=ColorJitterConfig(brightness=0.4, contrast=1.5, saturation=0.6, hue=0.5))
    assert config.color_jitter is not None
    image = cv2.resize(PHOTO, (SIZE, SIZE))
    for seed in range(30):
        expected: Any = Image.fromarray(image)
        for name, magnitude in draw_jitter(config.color_jitter, np.random.default_rng(seed)):
            expected = F.adjust_hue(expected, magnitude) if name == "Hue" else JITTER_FUNCTIONS[name](expected, 1 + magnitude)
        changed = image.copy()
        alter(changed, config, np.random.default_rng(seed))
        assert (changed == np.asarray(expected)).all()


def test_colour_jitter_draws_what_torchvision_draws() -> None:
    """Kolmogorov-Smirnov on the factors, chi-square on the 24 orders; 1.5 is wider than what a factor of 0 allows."""
    settings = {"brightness": 0.4, "contrast": 1.5, "saturation": 0.6, "hue": 0.2}
    names = ["Brightness", "Contrast", "Color", "Hue"]
    rng = np.random.default_rng(0)
    ours = [draw_jitter(ColorJitterConfig(**settings), rng) for _ in range(4000)]
    torch.manual_seed(0)
    transform = v2.ColorJitter(**settings)
    theirs = [transform.make_params([]) for _ in range(4000)]
    for name, setting in zip(names, settings, strict=True):
        centre = 0 if name == "Hue" else 1
        drawn = [centre + dict(changes)[name] for changes in ours]
        assert ks_2samp(drawn, [params[f"{setting}_factor"] for params in theirs]).pvalue > 0.001, name
    assert_alike(
        [tuple(name for name, _ in changes) for changes in ours],
        [tuple(names[place] for place in params["fn_idx"].tolist()) for params in theirs],
    )


def test_a_jitter_of_zero_changes_nothing() -> None:
    assert draw_jitter(ColorJitterConfig(), np.random.default_rng(0)) == []
    assert {name for name, _ in draw_jitter(ColorJitterConfig(hue=0.1), np.random.default_rng(0))} == {"Hue"}


def test_erased_boxes_have_torchvisions_distribution() -> None:
    """Kolmogorov-Smirnov on 4,000 boxes each, in a picture so flat that many a draw does not fit."""
    rng = np.random.default_rng(0)
    boxes = [draw_erased_box((200, 60), rng) for _ in range(4000)]
    torch.manual_seed(0)
    transform, picture = v2.RandomErasing(p=1.0), torch.empty(3, 60, 200)
    params = [transform.make_params([picture]) for _ in range(4000)]
    found = np.array([box for box in boxes if box is not None])
    theirs = np.array([[p[k] for k in ("j", "i", "w", "h")] for p in params if p["v"] is not None])
    assert abs(len(found) - len(theirs)) < 40
    for name, value in (
        ("area", lambda box: box[:, 2] * box[:, 3]),
        ("ratio", lambda box: box[:, 3] / box[:, 2]),
        ("left", lambda box: box[:, 0]),
        ("top", lambda box: box[:, 1]),
    ):
        assert ks_2samp(value(found), value(theirs)).pvalue > 0.001, name


def test_an_erased_part_is_one_box_near_zero_for_the_model() -> None:
    plain = AugmentConfig(crop_scale=None, flip=0)
    whole = train_picture(plain, 0)
    for sample in range(20):
        erased = train_picture(plain.model_copy(update={"erase": 1.0}), sample)
        is_erased = (erased == (124, 116, 104)).all(-1)
        rows, columns = np.flatnonzero(is_erased.sum(1) > 4), np.flatnonzero(is_erased.sum(0) > 4)
        box = np.zeros_like(is_erased)
        box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        assert is_erased[box].all() and (erased[~box] == whole[~box]).all()
        pixels = normalize(torch.from_numpy(erased)[None], Preprocessing(image_size=SIZE, eval_resize=SIZE))[0]
        assert pixels[:, torch.from_numpy(box)].abs().max() < 0.01


def test_flips_and_erasing_come_as_often_as_asked() -> None:
    whole = train_picture(AugmentConfig(crop_scale=None, flip=0), 0)
    config = AugmentConfig(crop_scale=None, flip=0.3, vertical_flip=0.6)
    looks = {(h, v): whole[:: -1 if v else 1, :: -1 if h else 1] for h in (False, True) for v in (False, True)}
    counts: Counter[tuple[bool, bool]] = Counter()
    for sample in range(600):
        picture = train_picture(config, sample)
        counts.update(key for key, look in looks.items() if (picture == look).all())
    assert counts.total() == 600
    for (h, v), count in counts.items():
        probability = (0.3 if h else 0.7) * (0.6 if v else 0.4)
        assert abs(count - 600 * probability) < 4 * math.sqrt(600 * probability)
    num_erased = sum((train_picture(AugmentConfig(crop_scale=None, flip=0, erase=0.25), s) != whole).any() for s in range(400))
    assert 65 < num_erased < 135


@pytest.mark.parametrize("config", [ALL_ON, AugmentConfig(policy=TRIVIALAUGMENT, erase=1.0)])
def test_a_sample_looks_the_same_whoever_decodes_it(config: AugmentConfig) -> None:
    """And is written to its place in the block, nowhere else."""
    block = np.full((3, SIZE, SIZE, 3), 7, np.uint8)
    torch.manual_seed(1)
    np.random.seed(1)
    first = [train_picture(config, sample) for sample in range(30)]
    assert len({picture.tobytes() for picture in first}) == 30
    for sample in reversed(range(30)):
        train_picture(config, sample, block[1])
        assert (block[1] == first[sample]).all()
    assert (block[[0, 2]] == 7).all()


def test_decoding_with_everything_on_needs_no_torch() -> None:
    code = (
        "import sys, cv2, numpy as np\n"
        "import eagleray.data.window\n"
        "from eagleray.data.transforms import decode_train\n"
        "from eagleray.config.schema import AugmentConfig\n"
        "augment = AugmentConfig(policy='randaugment', color_jitter={'hue': 0.1}, erase=1.0)\n"
        "data = cv2.imencode('.png', np.zeros((32, 32, 3), np.uint8))[1].tobytes()\n"
        "decode_train(data, (32, 32), augment, 16, np.random.default_rng(0))\n"
        "print([name for name in ('torch', 'torchvision', 'ray') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


JOB: dict[str, Any] = {"name": "pets", "data": {"train": "shards/train", "val": "shards/val"}}


def test_a_policy_may_be_given_by_its_name() -> None:
    job = build_job(JOB, ["data.augment.policy=randaugment", "data.augment.color_jitter.hue=0.1"])
    assert job.data.augment.policy == PolicyConfig(name="randaugment", num_ops=2, magnitude=9)
    assert job.data.augment.color_jitter == ColorJitterConfig(hue=0.1)
    assert build_job(job.model_dump(mode="json")) == job
    assert build_job(job.model_dump(mode="json"), ["data.augment.policy=null"]).data.augment.policy is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.augment.policy=randaugmnet",
            r"'data.augment.policy.name': input should be 'randaugment' or 'trivialaugment', got 'randaugmnet'",
        ),
        ("data.augment.policy={name: randaugment, magnitude: 31}", r"'data.augment.policy.magnitude': .*less than or equal to 30, got 31"),
        ("data.augment.policy={name: randaugment, num_ops: 0}", r"'data.augment.policy.num_ops': .*greater than or equal to 1, got 0"),
        ("data.augment.policy={name: randaugment, ops: 2}", r"unknown key 'data.augment.policy.ops' \(did you mean 'num_ops'\?\)"),
        ("data.augment.color_jitter={hue: 0.6}", r"'data.augment.color_jitter.hue': .*less than or equal to 0.5, got 0.6"),
        ("data.augment.color_jitter={colour: 0.6}", r"unknown key 'data.augment.color_jitter.colour'"),
        ("data.augment.erase=1.5", r"'data.augment.erase': .*less than or equal to 1, got 1.5"),
        ("train.mixup_alpha=-0.2", r"'train.mixup_alpha': .*greater than or equal to 0, got -0.2"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_job(JOB, [override])
