"""Latents and what is drawn for each sample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbadapter.base import Base
from dbadapter.data import LatentCache, draw, picture_indices
from dbadapter.photographs import Crop


def test_latents_are_redrawn_from_the_posterior(tiny_base: Base) -> None:
    pictures = list(torch.rand(3, 3, 32, 32) * 2 - 1)
    crops = [Crop(picture, None, (32, 32), (0, 0)) for picture in pictures]
    cache = LatentCache.encode(tiny_base.vae, crops, batch_size=2)
    assert len(cache) == 3
    assert {tuple(part.shape) for part in (*cache.mean, *cache.std)} == {(4, 8, 8)}
    with torch.no_grad():
        posterior = tiny_base.vae.encode(pictures[2][None]).latent_dist
    scale = 0.7  # of the tiny base's config; SD1's 0.18215 would be wrong here
    assert torch.allclose(cache.mean[2], posterior.mean[0] * scale, atol=1e-5)
    noise = torch.randn(2, 4, 8, 8)
    expected = (posterior.mean + posterior.std * noise[1]) * scale
    drawn = cache.sample([0, 2], noise)
    assert torch.allclose(drawn[1], expected[0], atol=1e-5)
    assert not torch.equal(drawn, cache.sample([0, 2], torch.randn(2, 4, 8, 8)))


def test_sampled_latents_stay_as_they_are() -> None:
    latents = torch.randn(2, 4, 8, 8)
    cache = LatentCache.of_latents(latents, 4)
    assert torch.equal(cache.sample([1], torch.randn(1, 4, 8, 8)), latents[1:])
    assert cache.time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * 2


def test_draws_are_keyed_by_sample_not_by_batch() -> None:
    whole = draw("instance", 7, 3, range(4), (4, 8, 8), 1000)
    halves = [draw("instance", 7, 3, part, (4, 8, 8), 1000) for part in (range(2), range(2, 4))]
    for index, name in enumerate(whole._fields):
        assert torch.equal(whole[index], torch.cat([half[index] for half in halves])), name


@pytest.mark.parametrize(
    "other", [("prior", 7, 3, [0]), ("instance", 8, 3, [0]), ("instance", 7, 4, [0]), ("instance", 7, 3, [1])]
)
def test_no_two_samples_share_a_noise(other: tuple[str, int, int, list[int]]) -> None:
    one = draw("instance", 7, 3, [0], (4, 8, 8), 1000)
    assert not torch.equal(one.noise, draw(*other, (4, 8, 8), 1000).noise)
    assert not torch.equal(one.noise, one.posterior_noise)


def test_timesteps_cover_the_schedule() -> None:
    timesteps = torch.cat(
        [draw("instance", 0, step, range(8), (1, 1, 1), 10).timesteps for step in range(50)]
    )
    assert set(timesteps.tolist()) == set(range(10))


@given(st.integers(0, 2**63 - 1), st.integers(1, 12), st.integers(0, 30), st.integers(1, 30))
def test_every_pass_uses_every_picture_once(seed: int, pictures: int, first: int, count: int) -> None:
    turns = picture_indices("instance", seed, range(3 * pictures), pictures)
    for turn in range(3):
        assert sorted(turns[turn * pictures : (turn + 1) * pictures]) == list(range(pictures))
    # Where a run is taken up again changes nothing.
    whole = picture_indices("instance", seed, range(first + count), pictures)
    assert picture_indices("instance", seed, range(first, first + count), pictures) == whole[first:]


def test_two_epochs_differ_in_noise_not_in_mean(tiny_base: Base) -> None:
    """The mean over many redraws of a cached picture comes to the posterior's mean; no two are the same."""
    crop = Crop(torch.rand(3, 32, 32) * 2 - 1, None, (32, 32), (0, 0))
    cache = LatentCache.encode(tiny_base.vae, [crop])
    drawn = [
        cache.sample([0], draw("instance", 0, epoch, [0], (4, 8, 8), 1000).posterior_noise)[0]
        for epoch in range(400)
    ]
    assert not torch.equal(drawn[0], drawn[1])
    error = (torch.stack(drawn).mean(0) - cache.mean[0]) / cache.std[0]
    assert error.abs().max() < 5 / 20  # five standard errors of 400 draws


def test_sizes_may_differ(tiny_base: Base) -> None:
    crops = [Crop(torch.zeros(3, *size), None, size, (0, 0)) for size in ((32, 32), (24, 40), (32, 32))]
    cache = LatentCache.encode(tiny_base.vae, crops)
    assert [cache.shape(index) for index in range(3)] == [(4, 8, 8), (4, 6, 10), (4, 8, 8)]
    assert cache.of_shape((4, 8, 8)) == [0, 2]
    assert torch.allclose(cache.mean[0], cache.mean[2], atol=1e-6)


def test_masks_weigh_the_latents_with_mean_1(tiny_base: Base) -> None:
    mask = torch.zeros(32, 32)
    mask[:, :16] = 1
    pixels = torch.zeros(3, 32, 32)
    cache = LatentCache.encode(
        tiny_base.vae, [Crop(pixels, mask, (32, 32), (0, 0)), Crop(pixels, None, (32, 32), (0, 0))]
    )
    weights = cache.weights([0, 1])
    assert weights is not None
    assert weights.shape == (2, 1, 8, 8)
    assert weights[0, 0, :, :4].unique().tolist() == [2]
    assert weights[0, 0, :, 4:].unique().tolist() == [0]
    assert weights[1].unique().tolist() == [1]
    assert cache.weights([1]) is None
    assert cache.without_masks().weights([0]) is None
