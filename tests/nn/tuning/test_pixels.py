"""mean_std: what torch says of all pixels at once, in whatever batches they come."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import modelctl.nn as mnn
from modelctl.errors import AmbiguousError, NoMatchError, RefusedError, UsageError


def pixels(kind=torch.float32, number=37):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(256, (number, 3, 7, 9), dtype=torch.uint8, generator=generator)
    raw[:, 1] //= 2
    raw[number // 2 :, 2] //= 3  # the batches are not alike
    return raw if kind == torch.uint8 else (raw.double() / 255).to(kind)


def whole(images):
    exact = images.double() / (255 if images.dtype == torch.uint8 else 1)
    return exact.mean((0, 2, 3)), exact.transpose(0, 1).flatten(1).std(dim=1)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 5, 36, 64])
def test_it_is_that_of_all_pixels(kind, size):
    images = pixels(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, std = mnn.mean_std(DataLoader(TensorDataset(images, images), batch_size=size))
    for found, expected in zip((mean, std), whole(images), strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_it_is_not_the_mean_of_the_batches():
    """Batches of 36 and 1: the mean of their numbers would count the last image 36 times."""
    images = pixels()
    images[-1] = 1
    batches = images.split(36)
    mean, std = mnn.mean_std(batches)
    torch.testing.assert_close(mean, whole(images)[0], rtol=1e-12, atol=0)
    assert (torch.stack([b.double().mean((0, 2, 3)) for b in batches]).mean(0) - mean).min() > 0.1
    assert (torch.stack([b.std((0, 2, 3)) for b in batches]).mean(0) < std).all()


def test_bytes_and_floats_agree_and_one_normalisation_does_it():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    raw = pixels(torch.uint8)
    mean, std = mnn.mean_std([raw])
    as_floats = mnn.mean_std([v2.functional.to_dtype(raw, torch.float64, scale=True)])
    torch.testing.assert_close((mean, std), as_floats, rtol=1e-12, atol=0)
    steps = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean.tolist(), std.tolist())]
    with pytest.warns(match="floats from -.* they look normalised already"):
        after = mnn.mean_std([v2.Compose(steps)(raw)])
    torch.testing.assert_close(after[0], torch.zeros(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(after[1], torch.ones(3).double(), rtol=0, atol=1e-6)


def test_digits_are_not_lost_far_from_zero():
    """A sum of squares in float32, or even in float64, would have none left."""
    images = 1e8 + torch.arange(4).double().reshape(4, 1, 1, 1)
    with pytest.warns(match="not divided by 255"):
        mean, std = mnn.mean_std(images.split(1))
    assert mean.item() == 1e8 + 1.5
    assert std.item() == pytest.approx((5 / 3) ** 0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (
            pixels(torch.uint8).float() / 255 / 255,
            "from 0 to 0.003922: they look divided by 255 tw",
        ),
        (pixels(torch.uint8).float(), "from 0 to 255: they look not divided by 255"),
        (pixels() - 0.5, "from -0.5 to 0.5: they look normalised already"),
    ],
)
def test_what_looks_odd_is_said(images, said):
    with pytest.warns(match=said):
        mnn.mean_std([images])


def test_batches_of_any_make():
    images = pixels()
    expected = mnn.mean_std([images])
    labels, masks = torch.zeros(37), torch.zeros(37, 1, 7, 9)
    for batch in (
        (images, labels),
        [images, masks],  # the first
        {"x": images, "y": labels},
    ):
        assert all(map(torch.equal, mnn.mean_std([batch]), expected))
    both = {"image": images, "mask": masks}
    assert all(map(torch.equal, mnn.mean_std([both], key="image"), expected))
    assert all(map(torch.equal, mnn.mean_std([(labels, masks, images)], key=2), expected))
    video = mnn.mean_std([images[:, :, None]])
    assert all(map(torch.equal, video, expected))


def test_it_is_float64_also_for_half_floats():
    """Sums in float16 end at 65,504."""
    mean, _ = mnn.mean_std([torch.full((4, 1, 512, 512), 0.5, dtype=torch.float16)])
    assert mean.item() == 0.5


REFUSED = {
    "nothing": ([], {}, NoMatchError, "the loader gave no batch"),
    "no images": ([torch.ones(3, 4, 4)], {}, NoMatchError, r"batch 0 has .* a tensor \(3, 4, 4\)"),
    "other things": ([{"a": 1}], {}, NoMatchError, "it is a dict of 'a'"),
    "several": (
        [{"a": pixels(), "b": pixels()}],
        {},
        AmbiguousError,
        "several entries like images: 'a', 'b'",
    ),
    "no such key": ([{"a": pixels()}], {"key": "b"}, UsageError, "batch 0 has no 'b'"),
    "channels last": ([torch.rand(2, 8, 8, 3)], {}, RefusedError, "their channels come last"),
    "integers": ([torch.ones(2, 3, 8, 8, dtype=torch.int64)], {}, RefusedError, "torch.int64"),
    "mixed": ([pixels(), pixels(torch.uint8)], {}, RefusedError, "batch 1 is torch.uint8 with 3"),
    "channels": ([pixels(), pixels()[:, :1]], {}, RefusedError, "batch 1 .* with 1 channels"),
    "nan": ([pixels(), pixels() / 0], {}, RefusedError, "batch 1 has NaN or infinity in channel 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    loader, options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        mnn.mean_std(loader, **options)
