"""What a cloud's metadata service says of a spot node."""

from __future__ import annotations

import time

import httpx
import pytest
from spot_for_tests import metadata_service

from eagleray.cluster.notices import GCP_GRACE_S, read_notice


def test_no_news_is_no_notice() -> None:
    with metadata_service() as metadata:
        assert read_notice("aws", metadata.url) is None
        assert read_notice("gcp", metadata.url) is None


def test_aws_names_the_time() -> None:
    with metadata_service() as metadata:
        metadata.deadline = float(int(time.time()) + 120)
        notice = read_notice("aws", metadata.url)
    assert notice is not None and notice.deadline == metadata.deadline


def test_google_cloud_gives_half_a_minute() -> None:
    with metadata_service() as metadata:
        metadata.deadline = 1.0
        notice = read_notice("gcp", metadata.url)
    assert notice is not None and notice.deadline == pytest.approx(time.time() + GCP_GRACE_S, abs=5)


def test_a_service_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(httpx.HTTPError):
        read_notice("aws", "http://127.0.0.1:9")
