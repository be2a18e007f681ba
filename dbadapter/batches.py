"""What a step trains on: batches of one shape, instance samples first, prior samples behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dbadapter.data import Draws, LatentCache, draw, picture_indices

__all__ = ["Batch", "Samples", "batches", "to_device", "validation_batches"]

VALIDATION_SAMPLES = 8


@dataclass(frozen=True)
class Samples:
    """Where samples come from, the same for every step of a run.

    Args:
        instance: latents of the photographs.
        prior: latents of the class; None without a prior.
        prompt_of: indices of the photographs' prompts, (k, pictures); pass n over them takes row n % k.
        class_prompt: index of the class prompt.
        seed: of the run.
        num_timesteps: of the noise schedule.
        train_batch_size: instance samples a forward pass, at most.
        a_step: instance samples a step, over all forward passes and processes.
        mine: the numbers of those that this process takes.
        device: where batches go.
    """

    instance: LatentCache
    prior: LatentCache | None
    prompt_of: Tensor
    class_prompt: int
    seed: int
    num_timesteps: int
    train_batch_size: int
    a_step: int
    mine: range
    device: torch.device


@dataclass(frozen=True)
class Batch:
    """Samples of one shape for one forward pass.

    Args:
        x0, noise: (samples, channels, height, width), on the device.
        timesteps: int64, (samples,), on the device.
        prompts: indices of their prompts, (samples,), on the CPU.
        time_ids: SDXL's micro-conditioning, (samples, 6), on the device.
        masks: weights of the instance samples' errors, (num_instance, 1, height, width), or None.
        num_instance: how many of them are instance samples; the rest are the prior's.
        share: of this process's instance samples of the step, above 0 and at most 1.
    """

    x0: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: Tensor
    time_ids: Tensor
    masks: Tensor | None
    num_instance: int
    share: float


def batches(samples: Samples, step: int) -> Iterator[Batch]:
    """Yield the batches of a step of this process.

    Photographs of different shapes cannot share a forward pass; each pass over them still takes each once,
    and a batch of several shapes becomes several smaller ones with their shares of the loss.
    """
    for start in range(samples.mine.start, samples.mine.stop, samples.train_batch_size):
        numbers = range(start, min(start + samples.train_batch_size, samples.mine.stop))
        of_run = [step * samples.a_step + number for number in numbers]
        chosen = picture_indices("instance", samples.seed, of_run, len(samples.instance))
        passes = [number // len(samples.instance) % len(samples.prompt_of) for number in of_run]
        prompts = [int(samples.prompt_of[row, index]) for row, index in zip(passes, chosen, strict=True)]
        of_shape: dict[tuple[int, ...], list[int]] = {}
        for place, index in enumerate(chosen):
            of_shape.setdefault(samples.instance.shape(index), []).append(place)
        for shape, places in of_shape.items():
            mine = [numbers[place] for place in places]
            draws = draw("instance", samples.seed, step, mine, shape, samples.num_timesteps)
            theirs = draw("prior", samples.seed, step, mine, shape, samples.num_timesteps)
            yield _batch(
                samples,
                [chosen[place] for place in places],
                [prompts[place] for place in places],
                [of_run[place] for place in places],
                (draws, theirs),
                len(places) / len(samples.mine),
            )


def validation_batches(samples: Samples) -> Iterator[Batch]:
    """Yield batches that are the same at every call: fixed noise, timesteps spread evenly, plain prompts."""
    count = VALIDATION_SAMPLES
    for number in range(count):
        index = number % len(samples.instance)
        shape = samples.instance.shape(index)
        timestep = torch.tensor([(2 * number + 1) * samples.num_timesteps // (2 * count)])
        pair = tuple(
            draw(f"validation {stream}", samples.seed, 0, [number], shape, samples.num_timesteps)._replace(
                timesteps=timestep
            )
            for stream in ("instance", "prior")
        )
        prompt = int(samples.prompt_of[0, index])
        yield _batch(samples, [index], [prompt], [number], (pair[0], pair[1]), 1 / count)


def _batch(
    samples: Samples,
    chosen: Sequence[int],
    prompts: Sequence[int],
    of_run: Sequence[int],
    draws: tuple[Draws, Draws],
    share: float,
) -> Batch:
    """Return the batch of these photographs, with as many prior samples of their shape behind them."""
    device, used = samples.device, [(samples.instance, chosen, draws[0])]
    prompts = list(prompts)
    if samples.prior is not None:
        same = samples.prior.of_shape(samples.instance.shape(chosen[0]))
        places = picture_indices("prior", samples.seed, of_run, len(same))
        used.append((samples.prior, [same[place] for place in places], draws[1]))
        prompts += [samples.class_prompt] * len(chosen)
    return Batch(
        x0=torch.cat(
            [
                cache.sample(indices, to_device(drawn.posterior_noise, device))
                for cache, indices, drawn in used
            ]
        ),
        noise=to_device(torch.cat([drawn.noise for *_, drawn in used]), device),
        timesteps=to_device(torch.cat([drawn.timesteps for *_, drawn in used]), device),
        prompts=torch.tensor(prompts),
        time_ids=torch.stack([cache.time_ids[index] for cache, indices, _ in used for index in indices]),
        masks=samples.instance.weights(chosen),
        num_instance=len(chosen),
        share=share,
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device; from pinned memory, so that the program need not wait for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
