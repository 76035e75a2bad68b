"""Pictures in tars, read in place: WebDataset, and ImageNet as it is distributed.

A tar's headers are read once, its members later by their ranges; nothing is unpacked.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from eagleray import storage
from eagleray.data.sources.listing import (
    IMAGE_SUFFIXES,
    LABEL_NAMES,
    Listing,
    build_items,
    checked,
    concat_items,
    number_classes,
    split_of_path,
    with_labels,
)
from eagleray.data.sources.patterns import matching_files
from eagleray.data.sources.reading import RangeReader
from eagleray.errors import DataError

LIST_THREADS = 8
LOCAL_BUFFER = 4096
REMOTE_BUFFER = 1 << 20
"""Bytes fetched at a time while headers are read: on S3 a request costs as much as this many bytes."""


class Member(NamedTuple):
    name: str
    offset: int
    size: int
    data: bytes | None
    """Contents of members that were asked for."""


def tar_members(uri: str, start: int = 0, wanted: tuple[str, ...] = ()) -> Iterator[Member]:
    """Yield the files of a tar in their order.

    Args:
        start: where the tar begins within the file at `uri`, in bytes.
        wanted: suffixes of members whose contents are read, too.

    Raises:
        DataError: not a tar, compressed, or cut off; names it.
    """
    with storage.open_file(uri) as opened:
        file = io.BufferedReader(opened, LOCAL_BUFFER if storage.is_local(uri) else REMOTE_BUFFER)
        file.seek(start)
        try:
            yield from _walk(file, wanted)
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"'{uri}': not a whole, uncompressed tar ({error}); fetch or unpack it again") from None


def _walk(file: Any, wanted: tuple[str, ...]) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or all of them would be kept
            if info.isfile():
                data = None
                if wanted and info.name.lower().endswith(wanted):
                    file.seek(info.offset_data)
                    data = file.read(info.size)
                yield Member(info.name, info.offset_data, info.size, data)


@dataclass(frozen=True)
class WebDataset:
    """Tars of samples: members with the same name up to the first dot are one sample, a picture and its `cls` or `json`.

    `uri` is a tar, a folder of tars, or a pattern such as `s3://bucket/train-{000000..000146}.tar`.
    """

    uri: str
    label_column: str | None = None
    class_names: str | None = None
    split_by_folder: bool = False

    def list_items(self) -> Listing:
        root, files = matching_files(self.uri, ".tar")
        with ThreadPoolExecutor(LIST_THREADS) as pool:
            parts = list(pool.map(lambda file: self._list_tar(root, file), files))
        classes, labels = number_classes([label for _, found in parts for label in found], self.uri, self.class_names)
        items = with_labels(concat_items([table for table, _ in parts]), labels)
        return checked(self.uri, Listing(classes, items, RangeReader(root)))

    def _list_tar(self, root: str, file: str) -> tuple[pa.Table, list[str]]:
        uri = storage.join(root, file)
        pictures: list[Member] = []
        labels: list[str] = []
        for key, members in _samples(tar_members(uri, wanted=(".cls", ".json"))):
            picture = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
            if picture is not None:
                pictures.append(picture)
                labels.append(self._label(f"{uri}: {key}", members))
        keys = [f"{file}/{picture.name}" for picture in pictures]
        split = split_of_path(file, self.uri) if self.split_by_folder else None
        sizes, offsets = [picture.size for picture in pictures], [picture.offset for picture in pictures]
        return build_items(keys, [0] * len(keys), sizes, files=file, offsets=offsets, split=split), labels

    def _label(self, where: str, members: dict[str, Member]) -> str:
        if ".cls" in members and self.label_column is None:
            return (members[".cls"].data or b"").decode(errors="replace").strip()
        names = LABEL_NAMES if self.label_column is None else (self.label_column,)
        if ".json" in members:
            try:
                document = json.loads(members[".json"].data or b"")
            except ValueError as error:
                raise DataError(f"'{where}': its json cannot be read ({error})") from None
            for name in names:
                if isinstance(document, dict) and document.get(name) is not None:
                    return str(document[name])
        raise DataError(f"'{where}': no label; a sample needs a .cls, or a .json with a field {' or '.join(names)} (--label-column)")


def _samples(members: Iterator[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Group neighbouring members with the same key; yields the key, and the members by their suffix in lower case."""
    current, sample = "", dict[str, Member]()
    for member in members:
        folder, name = posixpath.split(member.name)
        stem, _, suffix = name.partition(".")
        key = posixpath.join(folder, stem)
        if key != current and sample:
            yield current, sample
            sample = {}
        current = key
        sample["." + suffix.lower()] = member
    if sample:
        yield current, sample


TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


@dataclass(frozen=True)
class ImageNet:
    """The folder with the files of ILSVRC 2012 as they are distributed; classes are WordNet ids, splits `train` and `val`."""

    uri: str

    def list_items(self) -> Listing:
        root = storage.normalize_uri(self.uri)
        missing = [name for name in (TRAIN_TAR, VAL_TAR, DEVKIT) if not storage.exists(storage.join(root, name))]
        if missing:
            raise DataError(
                f"'{self.uri}': {', '.join(missing)} not found; download the ILSVRC 2012 files from image-net.org into one folder"
            )
        wnids, val_labels = read_devkit(storage.join(root, DEVKIT))
        items = concat_items([*self._list_train(root, wnids), self._list_val(root, wnids, val_labels)])
        return checked(self.uri, Listing(wnids, items, RangeReader(root)))

    def _list_train(self, root: str, wnids: list[str]) -> list[pa.Table]:
        """List the tar of tars, one per class."""
        uri = storage.join(root, TRAIN_TAR)
        index = {wnid: label for label, wnid in enumerate(wnids)}

        def list_class(tar: Member) -> pa.Table:
            wnid = tar.name.removesuffix(".tar")
            if wnid not in index:
                raise DataError(f"'{uri}': '{tar.name}' is none of the {len(wnids)} classes of the devkit")
            members = list(tar_members(uri, start=tar.offset))
            keys = [f"train/{wnid}/{posixpath.basename(member.name)}" for member in members]
            return _items(TRAIN_TAR, "train", keys, [index[wnid]] * len(keys), members)

        with ThreadPoolExecutor(LIST_THREADS) as pool:
            return list(pool.map(list_class, list(tar_members(uri))))

    def _list_val(self, root: str, wnids: list[str], val_labels: list[int]) -> pa.Table:
        uri = storage.join(root, VAL_TAR)
        members = list(tar_members(uri))
        numbers = [re.search(r"_val_(\d{8})\.JPEG$", member.name) for member in members]
        if len(members) != len(val_labels) or not all(numbers):
            raise DataError(f"'{uri}': {len(members)} pictures, but the devkit has {len(val_labels)} labels; fetch both again")
        labels = [val_labels[int(number[1]) - 1] for number in numbers if number]
        return _items(VAL_TAR, "val", [f"val/{posixpath.basename(member.name)}" for member in members], labels, members)


def _items(file: str, split: str, keys: list[str], labels: list[int], members: list[Member]) -> pa.Table:
    sizes, offsets = [member.size for member in members], [member.offset for member in members]
    return build_items(keys, labels, sizes, files=file, offsets=offsets, split=split)


def read_devkit(uri: str) -> tuple[list[str], list[int]]:
    """Return the sorted WordNet ids of the classes, and for each validation picture, in order of number, its index into them.

    The ground truth counts by `ILSVRC2012_ID`, which `meta.mat` maps to WordNet ids; synsets with children are no classes.
    """
    from scipy.io import loadmat

    try:
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(uri)), mode="r:gz") as devkit:
            meta = devkit.extractfile("ILSVRC2012_devkit_t12/data/meta.mat")
            truth = devkit.extractfile("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt")
            assert meta is not None and truth is not None
            synsets = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
            ids = [int(line) for line in truth.read().split()]
        wnid_of = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets if int(synset["num_children"]) == 0}
        wnids = sorted(wnid_of.values())
        index = {wnid: label for label, wnid in enumerate(wnids)}
        return wnids, [index[wnid_of[number]] for number in ids]
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError) as error:
        raise DataError(f"'{uri}': not the devkit of ILSVRC 2012 ({error}); fetch it again") from None
