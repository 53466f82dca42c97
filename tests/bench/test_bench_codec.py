"""``mesh bench codec``: what it measures on the shipped model, and how it reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh_codec import EntropyCodec, LosslessCodec, RawCodec
from mesh_core.bench.codec_pictures import PictureQuality, Pictures
from mesh_core.bench.codec_report import plot, table, verdicts
from mesh_core.bench.codec_settings import SETTINGS, CodecSetting
from mesh_core.builtin import load_plugins

MODEL = Path(__file__).parents[2] / "examples" / "tiny-klein" / "model"


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return Pictures(MODEL, load_plugins(), prompts=2, cut=None, text_tokens=40, size=128)


def test_exact_codecs_give_one_picture_and_the_lossy_one_nearly_that(pictures: Pictures) -> None:
    raw, lossless = (pictures.measure(CodecSetting("", make, {}), 2) for make in (RawCodec, LosslessCodec))
    assert raw.psnr_min == lossless.psnr_min and 16 < raw.bits < 16.2 and lossless.bits < 12
    lossy = pictures.measure(CodecSetting("", EntropyCodec, {"step": 0.1}), 2)
    assert 38 < lossy.psnr_min <= lossy.psnr_mean < raw.psnr_mean and lossy.bits < 5


def test_prediction_costs_fewer_bits_at_the_same_picture(pictures: Pictures) -> None:
    alone, predicted = (
        pictures.measure(CodecSetting("", EntropyCodec, {"step": 0.2, "temporal": t}), 4) for t in (False, True)
    )
    assert predicted.bits < 0.7 * alone.bits and abs(predicted.psnr_mean - alone.psnr_mean) < 3


def test_two_streams_cross_before_the_stacks_are_joined() -> None:
    early = Pictures(MODEL, load_plugins(), prompts=1, cut=2, text_tokens=40, size=128)
    assert early.measure(CodecSetting("", RawCodec, {}), 1).psnr_min > 50


RESULTS = [
    PictureQuality("entropy", "entropy step 0.1", 4, 2.5, 41.0, 43.0),
    PictureQuality("entropy", "entropy step 0.2", 4, 2.0, 39.9, 42.0),
    PictureQuality("entropy", "entropy step 0.1", 28, 1.5, 44.0, 45.0),
]


def test_the_table_has_a_row_per_setting_and_the_targets_count_the_least_psnr() -> None:
    lines = table(RESULTS).splitlines()
    assert lines[2].split()[-6:] == ["2.50", "41.0", "43.0", "1.50", "44.0", "45.0"]
    assert lines[3].split()[-3:] == ["2.00", "39.9", "42.0"]
    missed, met = sorted(verdicts(RESULTS))
    assert met.startswith("met") and "2.50 bits with entropy step 0.1" in met
    assert missed.startswith("MISSED") and "1.50" in missed


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    plot(RESULTS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_labels_are_one_each() -> None:
    assert len({row.label for row in SETTINGS}) == len(SETTINGS)
