"""What a decoding task makes of a window: the pixels of each picture's own bytes, by the quick way where there is one."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
from sklearn.datasets import load_sample_images

from eagleray import storage
from eagleray.config.schema import AugmentConfig
from eagleray.data.decode import crop_and_resize
from eagleray.data.plan import EpochPlan
from eagleray.data.shards import Manifest, encode_shard
from eagleray.data.tiling import tile
from eagleray.data.transforms import Preprocessing, decode_train
from eagleray.data.window import SampleRandom, WindowDecoder

PREPROCESSING = Preprocessing(image_size=96, eval_resize=112)


def jpegs() -> list[bytes]:
    photos = [photo[top : top + 300, :400] for photo in load_sample_images().images for top in (0, 60, 120)]
    return [cv2.imencode(".jpg", photo[:, :, ::-1])[1].tobytes() for photo in photos]


def test_tiled_jpegs_are_decoded_by_tiles_and_give_their_own_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [tile(data) for data in jpegs()]
    rows = [{"key": str(i), "image": data, "label": i % 2, "width": 400, "height": 300} for i, data in enumerate(pictures)]
    encoded, info = encode_shard("shard.parquet", rows, 100_000, ["a", "b"])
    storage.write_bytes(str(tmp_path / "shard.parquet"), encoded)
    plan = EpochPlan.of(Manifest(classes=["a", "b"], shards=[info], source="test"), 2, 2, 4, seed=3)
    decoder = WindowDecoder((str(tmp_path),), plan, PREPROCESSING, AugmentConfig())
    monkeypatch.setattr(cv2, "imdecode", lambda *arguments: pytest.fail("a whole picture was decoded"))
    seen = []
    for window in range(plan.num_windows):
        for block in decoder.blocks(0, window, 0, 1):
            for image, label, sample_id in zip(block["image"], block["label"], block["sample_id"], strict=True):
                rng = SampleRandom(3, 0).of(sample_id)
                assert (image == decode_train(pictures[sample_id], (400, 300), AugmentConfig(), 96, rng)).all()
                assert label == sample_id % 2
                seen.append(sample_id)
    assert sorted(seen) == list(range(len(pictures)))


@pytest.mark.parametrize("box", [(0, 0, 400, 300), (37, 41, 120, 101), (200, 100, 200, 200), (3, 3, 393, 290)])
def test_a_tiled_picture_gives_the_crop_of_the_untiled_one(box: tuple[int, int, int, int]) -> None:
    """Exactly, with and without DCT scaling."""
    data = jpegs()[0]
    for target in (224, 64, 32):
        assert (crop_and_resize(tile(data), (400, 300), box, target) == crop_and_resize(data, (400, 300), box, target)).all()
