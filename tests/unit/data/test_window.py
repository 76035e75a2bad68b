"""What a decoding task makes of a window: the pixels of each picture's own bytes, by the quick way where there is one."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from eagleray import storage
from eagleray.config.schema import AugmentConfig
from eagleray.data import window as window_module
from eagleray.data.decode import crop_and_resize, encode_raw
from eagleray.data.plan import EpochPlan
from eagleray.data.shards import Manifest, encode_shard
from eagleray.data.stream import BatchStream
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


def test_a_worker_that_decodes_by_itself_reads_small_sets_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more of large ones than it may keep; the pixels are the same either way."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
    rows = [{"key": str(i), "image": encode_raw(picture), "label": 0, "width": 8, "height": 8} for i, picture in enumerate(pixels)]
    encoded, info = encode_shard("shard.parquet", rows, 1000, ["a"])
    storage.write_bytes(str(tmp_path / "shard.parquet"), encoded)
    plan = EpochPlan.of(Manifest(classes=["a"], shards=[info], source="test"), 8, 2, 2, seed=3)
    reads: list[int] = []
    read = window_module.read_row_groups
    monkeypatch.setattr(
        window_module, "read_row_groups", lambda uri, path, groups, options: reads.extend(groups) or read(uri, path, groups, options)
    )

    def epochs(first: int, last: int) -> list[bytes]:
        decoder = WindowDecoder((str(tmp_path),), plan, Preprocessing(image_size=8, eval_resize=8), AugmentConfig())
        reads.clear()
        return [batch.images.numpy().tobytes() for epoch in BatchStream(decoder, 0, 1, None).epochs(first, last) for batch in epoch]

    seen, counts = [], []
    for kept in (1 << 20, 3 * 1040, 0):  # a row group is five pictures of 208 bytes
        monkeypatch.setattr(window_module, "KEPT_BYTES", kept)
        seen.append(epochs(0, 3))
        counts.append(len(reads))
    assert seen[0] == seen[1] == seen[2]
    assert counts[0] == len(plan.row_groups)
    assert counts[0] < counts[1] < counts[2]
