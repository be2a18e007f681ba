"""The training objective: forward diffusion, prediction targets, SNR weights, the DreamBooth loss. Pure."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dbadapter.errors import ConfigError

__all__ = [
    "Losses",
    "add_noise",
    "dreambooth_loss",
    "lr_factor",
    "sample_losses",
    "snr",
    "snr_weight",
    "target",
]


class Losses(NamedTuple):
    """The scalars of one step; `total` is what is differentiated."""

    total: Tensor
    instance: Tensor
    prior: Tensor


def add_noise(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Return the noised latents.

        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise        (Ho et al. 2020, equation 4)

    Args:
        x0: clean latents, (batch, channels, height, width).
        noise: standard normal, shape of x0.
        alphas_cumprod: abar, (num_train_timesteps,).
        timesteps: int64, (batch,).
    """
    signal, sigma = _coefficients(alphas_cumprod, timesteps, x0)
    return signal * x0 + sigma * noise


def target(
    prediction_type: str, x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor
) -> Tensor:
    """Return what the UNet should predict.

        epsilon:       noise
        v_prediction:  sqrt(abar_t) noise - sqrt(1 - abar_t) x0        (Salimans & Ho 2022, appendix D)

    Args: as `add_noise`.
    Raises:
        ConfigError: another prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal, sigma = _coefficients(alphas_cumprod, timesteps, x0)
        return signal * noise - sigma * x0
    raise _unknown(prediction_type)


def snr(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Return the signal-to-noise ratios abar_t / (1 - abar_t), shape (batch,)."""
    abar = alphas_cumprod[timesteps]
    return abar / (1 - abar)


def snr_weight(prediction_type: str, snr: Tensor, gamma: float) -> Tensor:
    """Return the min-SNR weights of the squared errors (Hang et al. 2023, section 3.4).

        epsilon:       min(snr, gamma) / snr
        v_prediction:  min(snr, gamma) / (snr + 1)

    Args:
        snr: shape (batch,); 0, of a schedule that ends in pure noise, has the limit 1 for epsilon.
    Raises:
        ConfigError: another prediction type.
    """
    if prediction_type == "epsilon":
        return torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    raise _unknown(prediction_type)


def sample_losses(
    model_pred: Tensor, wanted: Tensor, weights: Tensor | None = None, masks: Tensor | None = None
) -> Tensor:
    """Return each sample's weighted mean squared error, in float32, shape (batch,).

    Args:
        model_pred, wanted: (batch, channels, height, width), any float dtype.
        weights: (batch,); None is one each.
        masks: weights of the places, (batch, 1, height, width), with mean 1; None is one each.
    """
    errors = (model_pred.float() - wanted.float()).square()
    losses = (errors if masks is None else errors * masks).flatten(1).mean(1)
    return losses if weights is None else losses * weights


def dreambooth_loss(
    model_pred: Tensor,
    wanted: Tensor,
    num_instance: int,
    prior_loss_weight: float,
    weights: Tensor | None = None,
    masks: Tensor | None = None,
) -> Losses:
    """Return the loss of a batch that holds instance samples first, then prior samples.

        total = mean(instance) + lambda mean(prior)        (Ruiz et al. 2022, equation 2)

    Both terms are weighted per sample: weights of the whole batch against losses of half of it is a
    mistake others made (diffusers#5791).

    Args:
        model_pred: predictions, (num_instance + num_prior, channels, height, width).
        wanted: noise or v for the instance samples; for the prior samples the same, or what a teacher
            predicted.
        num_instance: how many of the batch are instance samples, 1 or more.
        prior_loss_weight: lambda.
        weights: per sample, (num_instance + num_prior,).
        masks: of the instance samples, (num_instance, 1, height, width); the prior has none.
    """
    if masks is not None:
        masks = torch.cat(
            [masks, torch.ones_like(masks[:1]).expand(len(model_pred) - num_instance, -1, -1, -1)]
        )
    losses = sample_losses(model_pred, wanted, weights, masks)
    instance = losses[:num_instance].mean()
    if len(losses) == num_instance:
        return Losses(instance, instance, torch.zeros_like(instance))
    prior = losses[num_instance:].mean()
    return Losses(instance + prior_loss_weight * prior, instance, prior)


def lr_factor(lr_scheduler: str, step: int, total: int, warmup: int = 0) -> float:
    """Return what the learning rate of a step is multiplied with.

        constant: 1        linear: 1 - step / total        cosine: (1 + cos(pi step / total)) / 2

    and, in the first `warmup` steps, with (step + 1) / (warmup + 1) besides. A function of step and total, so
    that a resumed run needs no state; a lengthened one goes on at the higher rate of the longer schedule.

    Args:
        step: counted from 0.
        total: steps of the whole run.
    Raises:
        ConfigError: another schedule.
    """
    rise = min(1.0, (step + 1) / (warmup + 1))
    if lr_scheduler == "constant":
        return rise
    if lr_scheduler == "linear":
        return rise * (1 - step / total)
    if lr_scheduler == "cosine":
        return rise * (1 + math.cos(math.pi * step / total)) / 2
    raise ConfigError(f"lr_scheduler must be constant, linear or cosine, got {lr_scheduler!r}")


def _coefficients(alphas_cumprod: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply a batch of latents."""
    abar = alphas_cumprod[timesteps].reshape(-1, *[1] * (like.ndim - 1))
    return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)


def _unknown(prediction_type: str) -> ConfigError:
    return ConfigError(f"prediction type must be epsilon or v_prediction, got {prediction_type!r}")
