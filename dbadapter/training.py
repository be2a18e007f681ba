"""Training: photographs in, an adapter out. `train_step` is the method, `train` the job around it."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from dbadapter import checkpoint
from dbadapter.adapter import Adapter
from dbadapter.adapter_file import verify, write_adapter
from dbadapter.base import Base, Precision, encode_prompt, load_base, pick_precision, tokenize
from dbadapter.checkpoint import Snapshot
from dbadapter.config import TrainConfig
from dbadapter.data import LatentCache, draw, load_photograph, mirrored, picture_indices
from dbadapter.errors import TrainingError
from dbadapter.lora import apply, collect, inject
from dbadapter.model_card import Made, describe, draw_samples, last_losses, model_card
from dbadapter.objective import add_noise, dreambooth_loss, lr_factor, snr, snr_weight, target
from dbadapter.plan import Plan, plan
from dbadapter.prior import Prior, distill_prior, generated_prior, teacher_prediction
from dbadapter.prompts import instance_prompts
from dbadapter.run_folder import RunFolder, write_text
from dbadapter.sampling import Picture, save_pictures
from dbadapter.speed import (
    DTYPES,
    autocast,
    enable_gradient_checkpointing,
    keep_freed_memory,
    peak_memory_mb,
    prepare_frozen,
    use_fast_layers,
)

__all__ = ["Run", "TrainResult", "prepare", "train", "train_step"]

MAX_GRAD_NORM = 1.0
LOG_EVERY = 10  # steps between two looks at the losses: each one waits for the device

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainResult:
    """What a run left, and what it took.

    Args:
        adapter_path: the file to share.
        config: resolved.
        steps: optimizer steps of the adapter, those before a resume included.
        seconds: wall time of this call, loading and samples included.
        peak_memory_mb: of the process so far, or of the GPU where there is one; 1 MB = 2**20 bytes.
        metrics_path: one JSON object a step.
        sample_paths: the sample pictures, then their grid.
        instance_loss, prior_loss: means over the last tenth of the steps; None without a prior.
    """

    adapter_path: Path
    config: TrainConfig
    steps: int
    seconds: float
    peak_memory_mb: float
    metrics_path: Path
    sample_paths: tuple[Path, ...]
    instance_loss: float
    prior_loss: float | None


@dataclass
class Run:
    """A run that is set up: the models with their adapters, and all that a step reads."""

    config: TrainConfig
    base: Base
    precision: Precision
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    alphas_cumprod: Tensor
    instance_cache: LatentCache
    prior: Prior | None
    prompt_ids: Tensor  # each prompt once, the class prompt last if there is a prior; (prompts, length)
    prompt_of: Tensor  # indices into prompt_ids, (k, pictures), on the CPU; pass n takes row n % k
    embeddings: Tensor | None  # of the prompts, where the text encoder is not trained
    step: int = 0

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes in the run's precision."""
        return autocast(self.base.device, self.precision)


def train_step(run: Run, step: int) -> Tensor:
    """Take one optimizer step and return total, instance and prior loss and the gradient's norm, (4,).

        L = mean |pred(x_t, c_instance) - target|^2 + lambda mean |pred(x'_t, c_class) - prior target|^2

    (Ruiz et al. 2022, equation 2). The prior's target is the prediction of the same model with all adapters
    off (`distill`), or noise or v (`generated`). The result stays on the device: nothing waits for it here.
    """
    config, batch = run.config, int(run.config.train_batch_size or 1)
    unet, text_encoder, abar = run.base.unet, run.base.text_encoder, run.alphas_cumprod
    losses_of_step = torch.zeros(3, device=run.base.device)
    for micro in range(config.gradient_accumulation_steps):
        # 1. What is noised, and how: instance samples first, prior samples behind, in one batch.
        samples = range(micro * batch, (micro + 1) * batch)
        chosen, x0, noise, timesteps = _drawn(run, "instance", run.instance_cache, step, samples)
        prompts = run.prompt_of[_passes(run, step, samples) % len(run.prompt_of), chosen]
        if run.prior is not None:
            _, *theirs = _drawn(run, "prior", run.prior.cache, step, samples)
            ours = (x0, noise, timesteps)
            x0, noise, timesteps = (torch.cat(pair) for pair in zip(ours, theirs, strict=True))
            prompts = torch.cat([prompts, torch.full((batch,), len(run.prompt_ids) - 1)])
        x_t = add_noise(x0, noise, abar, timesteps)
        wanted = target(run.base.prediction_type, x0, noise, abar, timesteps)
        with run.autocast():
            # 2. The teacher: the model without its adapters, on the prior samples.
            if run.prior is not None and run.prior.teacher_embedding is not None:
                embedding = run.prior.teacher_embedding
                theirs_pred = teacher_prediction(unet, x_t[batch:], timesteps[batch:], embedding)
                wanted = torch.cat([wanted[:batch], theirs_pred.to(wanted.dtype)])
            # 3. The model that learns, with the prompts' embeddings by its own text encoder.
            if run.embeddings is not None:
                embeddings = run.embeddings[prompts]
            else:
                used, places = torch.unique(prompts, return_inverse=True)
                embeddings = text_encoder(run.prompt_ids[used]).last_hidden_state[places]
            model_pred = unet(x_t, timesteps, embeddings).sample
        # 4. The loss, both terms weighted per sample.
        weights = None
        if config.snr_gamma is not None:
            weights = snr_weight(run.base.prediction_type, snr(abar, timesteps), config.snr_gamma)
        losses = dreambooth_loss(model_pred, wanted, batch, float(config.prior_loss_weight or 0), weights)
        run.scaler.scale(losses.total / config.gradient_accumulation_steps).backward()
        losses_of_step += torch.stack(losses).detach() / config.gradient_accumulation_steps
    # 5. The update of the float32 factors.
    factor = lr_factor(str(config.lr_scheduler), step, int(config.max_train_steps or 1))
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.parameters, MAX_GRAD_NORM)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return torch.cat([losses_of_step, norm.detach()[None]])


def train(config: TrainConfig, *, progress: Progress | None = None) -> TrainResult:
    """Train an adapter, write it with all that belongs to it, and prove the file equal to the model.

    Args:
        config: fields left at None come from the preset of the base's family.
        progress: called with (stage, parts done, of how many).
    Raises:
        ConfigError, UsageError, DataError, BaseError, OutputError: before anything is written.
        TrainingError: a loss that is not finite; what was learned before it is in a checkpoint.
        KeyboardInterrupt: the same.
    """
    started_at, start = datetime.now(UTC), time.perf_counter()
    report: Progress = progress or (lambda stage, done, total: None)
    made, adapter, folder, device = _learn(config, started_at, report)
    # Written before the samples are drawn, by a base loaded anew: from here on nothing can lose the
    # adapter, and the samples show what the file does, not what the model in memory does.
    description = describe(made)
    write_adapter(folder.adapter, adapter, description=description, sidecars=False, overwrite=True)
    verify(folder.adapter, adapter)
    folder.settle()
    pictures = _samples(made, folder, device, report)
    sample_paths = tuple(save_pictures(pictures, folder.samples, overwrite=True))
    preview = pictures[0].image
    write_adapter(folder.adapter, adapter, description=description, preview=preview, overwrite=True)
    verify(folder.adapter, adapter)
    write_text(folder.card, model_card(made))
    return TrainResult(
        adapter_path=folder.adapter,
        config=made.config,
        steps=made.steps,
        seconds=time.perf_counter() - start,
        peak_memory_mb=peak_memory_mb(device),
        metrics_path=folder.metrics,
        sample_paths=sample_paths,
        instance_loss=made.last_losses["instance_loss"] or 0.0,
        prior_loss=made.last_losses["prior_loss"],
    )


def prepare(
    config: TrainConfig,
    base: Base,
    photographs: Sequence[Path],
    *,
    class_images: Path,
    progress: Progress | None = None,
) -> Run:
    """Set a run up: latents cached, prior made, the base's weights cast in place, adapters injected.

    Args:
        config: resolved.
        base: used up: its weights are cast, and it carries the adapters.
        class_images: where prior `generated` keeps its pictures.
    """
    report: Progress = progress or (lambda stage, done, total: None)
    resolution, device = int(config.resolution or base.resolution), base.device
    precision = pick_precision(device, config.mixed_precision)
    pictures = [load_photograph(path, resolution) for path in photographs]
    instance_cache = LatentCache.encode(base.vae, mirrored(pictures) if config.random_flip else pictures)
    rows = [row * (1 + config.random_flip) for row in instance_prompts(config, base.tokenizer, len(pictures))]
    own = list(dict.fromkeys(prompt for row in rows for prompt in row))
    prompts = own + [str(config.class_prompt)] * (config.prior != "none")
    prior: Prior | None = None
    with autocast(device, precision):
        if config.prior == "generated":
            prior = generated_prior(base, config, class_images, report)
        prepare_frozen(base, precision)
        if config.prior == "distill":
            prior = distill_prior(base, config, instance_cache, report)
        embeddings = None
        if not config.train_text_encoder:
            with torch.no_grad():
                embeddings = encode_prompt(base.text_encoder, base.tokenizer, prompts)
    alpha, text_rank = float(config.alpha or config.rank), int(config.text_encoder_rank or config.rank)
    factors = inject(
        base.unet,
        base.text_encoder if config.train_text_encoder else None,
        rank=config.rank,
        alpha=alpha,
        text_encoder_rank=text_rank,
        # alpha / rank is the scale in both, whatever the text encoder's rank.
        text_encoder_alpha=alpha / config.rank * text_rank,
        targets=config.targets or (),
        seed=config.seed,
    )
    use_fast_layers(base, resolution)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(base)
    groups = [
        {"params": factors.unet, "initial_lr": config.learning_rate},
        {"params": factors.text_encoder, "initial_lr": config.text_encoder_learning_rate},
    ]
    return Run(
        config=config,
        base=base,
        precision=precision,
        parameters=[*factors.unet, *factors.text_encoder],
        optimizer=torch.optim.AdamW([group for group in groups if group["params"]], fused=True),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        alphas_cumprod=base.noise_scheduler().alphas_cumprod.to(device),
        instance_cache=instance_cache,
        prior=prior,
        prompt_ids=tokenize(base.tokenizer, prompts).to(device),
        prompt_of=torch.tensor([[own.index(prompt) for prompt in row] for row in rows]),
        embeddings=embeddings,
    )


def _learn(
    config: TrainConfig, started_at: datetime, report: Progress
) -> tuple[Made, Adapter, RunFolder, torch.device]:
    """Check everything, then train; the models are free for collection when this returns."""
    found = plan(config)
    config, base, folder, snapshot = found.config, found.base, found.folder, found.snapshot
    keep_freed_memory(base.device)
    folder.start(config.to_toml(), resumed_step=snapshot.step if snapshot else 0)
    try:
        run = prepare(config, base, found.photographs, class_images=folder.class_images, progress=report)
        if snapshot is not None:
            checkpoint.restore(snapshot, run.parameters, run.optimizer, run.scaler)
            run.step = snapshot.step
        _loop(run, folder, found, report)
    except BaseException:
        if checkpoint.newest(folder.checkpoints) is None:
            folder.abandon()
        else:
            folder.settle()
        raise
    made = Made(
        config=config,
        base_name=base.name,
        prediction_type=base.prediction_type,
        precision=run.precision,
        photographs=len(found.photographs),
        steps=run.step,
        last_losses=last_losses(folder.read_metrics()),
        started_at=started_at,
        finished_at=datetime.now(UTC),
    )
    return made, collect(base.unet, base.text_encoder, base.family), folder, base.device


def _loop(run: Run, folder: RunFolder, found: Plan, report: Progress) -> None:
    """Take the steps; whatever ends them early, the last good state is written as a checkpoint."""
    config, total, good = run.config, int(run.config.max_train_steps or 0), found.snapshot
    pending: list[tuple[Tensor, float]] = []

    def due(every: int | None) -> bool:
        return bool(every) and (run.step == total or run.step % int(every or 1) == 0)

    report("train", run.step, total)
    try:
        while run.step < total:
            began = time.perf_counter()
            values = train_step(run, run.step)
            pending.append((values, time.perf_counter() - began))
            run.step += 1
            if due(LOG_EVERY) or due(config.checkpointing_steps):
                _log(run, folder, pending, good)
                good = checkpoint.capture(run.step, run.parameters, run.optimizer, run.scaler, found.identity)
                pending = []
            if good is not None and due(config.checkpointing_steps):
                checkpoint.write(folder.checkpoints, good)
            if due(config.validation_steps) and run.step < total:
                with run.autocast():
                    pictures = draw_samples(config, run.base)
                save_pictures(pictures, folder.samples / f"step-{run.step:06d}", overwrite=True)
            report("train", run.step, total)
    except BaseException as error:
        if good is not None:
            checkpoint.write(folder.checkpoints, good)
            if isinstance(error, KeyboardInterrupt):
                raise type(error)(f"add --resume to go on from step {good.step}") from None
        raise


def _log(run: Run, folder: RunFolder, pending: Sequence[tuple[Tensor, float]], good: Snapshot | None) -> None:
    """Append the steps' losses to the metrics, and stop at one that is not finite."""
    first = run.step - len(pending)
    rows = torch.stack([values for values, _ in pending]).tolist()
    lines: list[dict[str, float | int | None]] = []
    for number, (row, (_, seconds)) in enumerate(zip(rows, pending, strict=True), start=first + 1):
        # In fp16 a gradient may overflow: the scaler skips that step and goes on with a smaller scale.
        checked = row[:3] if run.precision == "fp16" else row
        if not all(math.isfinite(value) for value in checked):
            kept = "start again" if good is None else f"add --resume to go on from step {good.step}"
            raise TrainingError(
                f"the loss is not finite at step {number}: lower --learning-rate (it is "
                f"{run.config.learning_rate:g}) or pass --mixed-precision no, and {kept}"
            )
        loss, instance, prior, norm = row
        lines.append(
            {
                "step": number,
                "loss": loss,
                "instance_loss": instance,
                "prior_loss": None if run.prior is None else prior,
                "grad_norm": norm if math.isfinite(norm) else None,
                "seconds": round(seconds, 4),
            }
        )
    folder.append_metrics(lines)


def _drawn(
    run: Run, stream: str, cache: LatentCache, step: int, samples: range
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Return which pictures the samples of a step use, and latents, noise, timesteps on the device."""
    seed, device = run.config.seed, run.base.device
    draws = draw(stream, seed, step, samples, cache.mean.shape[1:], len(run.alphas_cumprod))
    first = step * _samples_of_a_step(run) + samples.start
    chosen = picture_indices(stream, seed, first, len(samples), len(cache))
    x0 = cache.sample(chosen, draws.posterior_noise)
    return chosen, x0, draws.noise.to(device), draws.timesteps.to(device)


def _passes(run: Run, step: int, samples: range) -> Tensor:
    """Return in which pass over the pictures these samples of a step lie, counted from 0, (samples,)."""
    return (step * _samples_of_a_step(run) + torch.tensor(samples)) // len(run.instance_cache)


def _samples_of_a_step(run: Run) -> int:
    return int(run.config.train_batch_size or 1) * run.config.gradient_accumulation_steps


def _samples(made: Made, folder: RunFolder, device: torch.device, report: Progress) -> list[Picture]:
    """Return the sample pictures, by the adapter's file on a base loaded anew."""
    config = made.config
    gc.collect()  # the trained models, before the same are loaded once more
    # In the fast precision on a GPU; on a CPU a few pictures do not pay for rounding.
    dtype = DTYPES[made.precision] if device.type == "cuda" else torch.float32
    base = load_base(config.base, device=device, dtype=dtype, prediction_type=config.prediction_type)
    apply(base.pipeline, {folder.adapter: 1.0})
    return draw_samples(config, base, folder.adapter, report)
