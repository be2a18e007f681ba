"""The objective against its formulas, and the traps that other trainers fell into."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from dbadapter.errors import ConfigError
from dbadapter.objective import (
    add_noise,
    dreambooth_loss,
    lr_factor,
    sample_losses,
    snr,
    snr_weight,
    target,
)

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ABAR = SCHEDULER.alphas_cumprod


def batch(size: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, size, 4, 3, 3, generator=generator)
    return x0, noise, torch.linspace(0, 999, size).long()


def test_noise_and_targets_are_those_of_diffusers() -> None:
    x0, noise, timesteps = batch()
    assert torch.allclose(
        add_noise(x0, noise, ABAR, timesteps), SCHEDULER.add_noise(x0, noise, timesteps), atol=1e-6
    )
    velocity = SCHEDULER.get_velocity(x0, noise, timesteps)
    assert torch.allclose(target("v_prediction", x0, noise, ABAR, timesteps), velocity, atol=1e-6)
    assert torch.equal(target("epsilon", x0, noise, ABAR, timesteps), noise)


def test_v_and_x_t_determine_x0() -> None:
    x0, noise, timesteps = batch()
    x_t, v = add_noise(x0, noise, ABAR, timesteps), target("v_prediction", x0, noise, ABAR, timesteps)
    abar = ABAR[timesteps].reshape(-1, 1, 1, 1)
    assert torch.allclose(abar.sqrt() * x_t - (1 - abar).sqrt() * v, x0, atol=1e-5)


@given(st.integers(0, 999), st.floats(0.5, 20))
def test_snr_weights(timestep: int, gamma: float) -> None:
    ratio = snr(ABAR, torch.tensor([timestep]))
    clipped = min(ratio.item(), gamma)
    assert snr_weight("epsilon", ratio, gamma).item() == pytest.approx(clipped / ratio.item(), rel=1e-5)
    assert snr_weight("v_prediction", ratio, gamma).item() == pytest.approx(
        clipped / (ratio.item() + 1), rel=1e-5
    )


def test_zero_snr_has_a_finite_weight() -> None:
    """A schedule rescaled to zero terminal SNR must not divide by zero."""
    assert snr_weight("epsilon", torch.zeros(1), 5.0).item() == 1
    assert snr_weight("v_prediction", torch.zeros(1), 5.0).item() == 0


def test_unknown_prediction_type() -> None:
    x0, noise, timesteps = batch()
    with pytest.raises(ConfigError, match="got 'sample'"):
        target("sample", x0, noise, ABAR, timesteps)
    with pytest.raises(ConfigError):
        snr_weight("sample", torch.ones(1), 5.0)


@pytest.mark.parametrize(
    ("lr_scheduler", "factors"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.853553, 0.5, 0.146447])],
)
def test_lr_factor(lr_scheduler: str, factors: list[float]) -> None:
    assert [lr_factor(lr_scheduler, step, 4) for step in range(4)] == pytest.approx(factors, abs=1e-6)


def test_unknown_schedule() -> None:
    with pytest.raises(ConfigError, match="got 'polynomial'"):
        lr_factor("polynomial", 0, 1)


def test_loss_terms() -> None:
    pred, wanted = torch.zeros(5, 1, 2, 2), torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 1, 2, 2)
    losses = dreambooth_loss(pred, wanted, num_instance=2, prior_loss_weight=0.5)
    assert losses.instance.item() == pytest.approx((0 + 1) / 2)
    assert losses.prior.item() == pytest.approx((4 + 9 + 16) / 3)
    assert losses.total.item() == pytest.approx(0.5 + 0.5 * 29 / 3)


def test_without_prior() -> None:
    pred, wanted, _ = batch()
    losses = dreambooth_loss(pred, wanted, num_instance=5, prior_loss_weight=1.0)
    assert losses.total == losses.instance
    assert losses.total.item() == pytest.approx((pred - wanted).square().mean().item())
    assert losses.prior == 0


def test_weights_apply_to_both_terms_per_sample() -> None:
    """diffusers#5791: weights of the whole batch met the losses of half of it."""
    pred, wanted, _ = batch(4)
    weights = torch.tensor([1.0, 2.0, 0.0, 4.0])
    losses = dreambooth_loss(pred, wanted, 2, 1.0, weights)
    each = (pred - wanted).square().mean((1, 2, 3))
    assert losses.instance.item() == pytest.approx(((each[0] + 2 * each[1]) / 2).item())
    assert losses.prior.item() == pytest.approx((4 * each[3] / 2).item())


def test_half_precision_predictions_are_compared_in_float32() -> None:
    pred = torch.full((1, 1, 64, 64), 300.0, dtype=torch.float16)
    loss = sample_losses(pred, torch.zeros_like(pred))  # 300^2 is beyond float16
    assert loss.dtype == torch.float32
    assert loss.item() == 90000
