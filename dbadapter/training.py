"""Training: photographs in, an adapter out. `train_step` is the method, `train` the job around it."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime

import torch
from torch import Tensor, nn

from dbadapter import checkpoint
from dbadapter.batches import Batch, batches, to_device, validation_batches
from dbadapter.checkpoint import Best, Snapshot
from dbadapter.conditioning import encode, predict
from dbadapter.config import TrainConfig
from dbadapter.errors import OutputError, TrainingError
from dbadapter.finishing import Trained, TrainResult, finished_result, result_of, write_results
from dbadapter.lock import only_run
from dbadapter.loggers import Logger, make_logger
from dbadapter.model_card import Made, draw_samples, last_losses
from dbadapter.objective import Losses, add_noise, dreambooth_loss, lr_factor, snr, snr_weight, target
from dbadapter.plan import Plan, plan
from dbadapter.preparation import Run, prepare
from dbadapter.prior import teacher_prediction
from dbadapter.processes import Processes, local_device, processes
from dbadapter.run_folder import Finished, RunFolder
from dbadapter.sampling import save_pictures
from dbadapter.selection import GIVEN, Selection, best_of, scored_from
from dbadapter.speed import hand_back_freed_memory, keep_freed_memory, peak_memory_mb, use_tensor_cores

__all__ = ["Run", "TrainResult", "batch_losses", "prepare", "train", "train_step", "validation_loss"]

MAX_GRAD_NORM = 1.0
LOG_EVERY = 10  # steps between two looks at the losses: each one waits for the device

Progress = Callable[[str, int, int], None]
Figures = Mapping[str, float | int | None]


def train_step(run: Run, step: int) -> Tensor:
    """Take one optimizer step and return total, instance and prior loss and the gradient's norm, (4,).

    The result stays on the device: nothing waits for it here.
    """
    config = run.config
    losses_of_step = torch.zeros(3, device=run.base.device)
    for batch in batches(run.samples, step):
        losses = batch_losses(run, batch)
        run.scaler.scale(losses.total * batch.share).backward()
        losses_of_step += torch.stack(losses).detach() * batch.share
    # The update of the float32 factors, by the mean gradient of all processes.
    run.processes.average_gradients(run.parameters)
    factor = lr_factor(
        str(config.lr_scheduler), step, int(config.max_train_steps or 1), config.lr_warmup_steps
    )
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.parameters, MAX_GRAD_NORM)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return torch.cat([losses_of_step, norm.detach()[None]])


def batch_losses(run: Run, batch: Batch) -> Losses:
    """Return total, instance and prior loss of one forward pass; the total carries the gradient.

        L = mean |pred(x_t, c_instance) - target|^2 + lambda mean |pred(x'_t, c_class) - prior target|^2

    (Ruiz et al. 2022, equation 2). The prior's target is the prediction of the same model with all adapters
    off (`distill`), or noise or v (`generated`).
    """
    config, base, abar, ours = run.config, run.base, run.alphas_cumprod, batch.num_instance
    # 1. What is noised, and how.
    x_t = add_noise(batch.x0, batch.noise, abar, batch.timesteps)
    wanted = target(base.prediction_type, batch.x0, batch.noise, abar, batch.timesteps)
    with run.autocast():
        # 2. The teacher: the model without its adapters, on the prior samples.
        if run.prior is not None and run.prior.teacher is not None:
            theirs = (x_t[ours:], batch.timesteps[ours:], run.prior.teacher, batch.time_ids[ours:])
            wanted = torch.cat([wanted[:ours], teacher_prediction(run.teacher, *theirs).to(wanted.dtype)])
        # 3. The model that learns, with the prompts' embeddings by its own text encoders.
        if run.conditioning is not None:
            conditioning = run.conditioning.of(to_device(batch.prompts, base.device))
        else:
            prompts, places = torch.unique(batch.prompts, return_inverse=True)
            used = to_device(prompts, base.device)
            encoded = encode(base, tuple(ids[used] for ids in run.prompt_ids))
            conditioning = encoded.of(to_device(places, base.device))
        model_pred = predict(base.unet, x_t, batch.timesteps, conditioning, batch.time_ids)
    # 4. The loss, both terms weighted per sample.
    weights = None
    if config.snr_gamma is not None:
        weights = snr_weight(base.prediction_type, snr(abar, batch.timesteps), config.snr_gamma)
    weight = float(config.prior_loss_weight or 0)
    return dreambooth_loss(model_pred, wanted, ours, weight, weights, batch.masks)


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """Return the total loss over samples that are always the same: photographs, noise, timesteps.

    The loss of a step is mostly the luck of its timesteps; this one compares checkpoints.
    """
    totals = [batch_losses(run, batch).total * batch.share for batch in validation_batches(run.samples)]
    return float(torch.stack(totals).sum())


def train(
    config: TrainConfig,
    *,
    progress: Progress | None = None,
    on_log: Callable[[Figures], None] | None = None,
) -> TrainResult:
    """Train an adapter, write it with all that belongs to it, and prove the file equal to the model.

    Started by `accelerate launch`, every process calls this; the first one writes.

    Args:
        config: fields left at None come from the preset of the base's family.
        progress: called with (stage, parts done, of how many).
        on_log: called with the newest line of metrics.jsonl at every look at the losses.
    Raises:
        ConfigError, UsageError, DataError, BaseError, OutputError: before anything is written.
        OutputError: later, where nothing more can be written; what was saved stays.
        TrainingError: a loss that is not finite; what was learned before it is in a checkpoint.
        KeyboardInterrupt: the same.
    """
    started_at, start, ours = datetime.now(UTC), time.perf_counter(), processes()
    report: Progress = progress if progress is not None and ours.is_main else lambda stage, done, total: None
    with ExitStack() as stack:
        if ours.is_main:
            stack.enter_context(only_run(config.output_dir))
        found = plan(config, device=local_device(), processes=ours.count)
        at = -1 if found.finished else found.snapshot.step if found.snapshot is not None else 0
        if not ours.agree(at):  # it also waits until all have seen the folder as it was
            raise OutputError(
                f"the processes see different states of {config.output_dir}: put it on a disk that all share"
            )
        if found.finished:
            return finished_result(found.config, found.folder, time.perf_counter() - start)
        folder, identity = found.folder, found.identity
        trained = _learn(found, started_at, ours, report, on_log or (lambda figures: None))
        del found  # the models, before the samples' base is loaded
        hand_back_freed_memory(trained.device)
        if ours.is_main:
            write_results(trained, folder, report)
            folder.finish(Finished(trained.made.steps, identity, trained.made.config.max_train_steps))
        ours.wait()
        return result_of(trained, folder, time.perf_counter() - start)


def _learn(
    found: Plan, started_at: datetime, ours: Processes, report: Progress, on_log: Callable[[Figures], None]
) -> Trained:
    """Train; the models are free for collection when this returns."""
    config, base, folder, snapshot = found.config, found.base, found.folder, found.snapshot
    device = base.device
    keep_freed_memory(device)
    use_tensor_cores(device)
    if ours.is_main:
        folder.start(config.to_toml(), resumed_step=snapshot.step if snapshot else 0)
    ours.wait()
    logger: Logger | None = None
    try:
        logger = make_logger(
            config.logger if ours.is_main else "none",
            folder.path,
            dataclasses.asdict(config),
            first_step=snapshot.step if snapshot else 0,
        )
        run = prepare(
            config, base, found.photographs, class_folder=folder.class_images, processes=ours, progress=report
        )
        # Before anything is restored: the adapters do nothing yet, so this is the base.
        selection = Selection.start(run, folder.read_metrics(), report) if config.select == "best" else None
        if snapshot is not None:
            checkpoint.restore(snapshot, run.parameters, run.optimizer, run.scaler)
            run.step = snapshot.step
        best = _loop(run, found, logger, selection, report, on_log)
    except BaseException:
        if ours.is_main:
            folder.give_up()
        raise
    finally:
        if logger is not None:
            logger.close()
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
    # An adapter whose pictures are not finite is of no use to anybody.
    keep_last = selection is None or not selection.broken
    return Trained.of(made, run, found.base.family, best, folder, keep_last=keep_last)


def _loop(
    run: Run,
    found: Plan,
    logger: Logger,
    selection: Selection | None,
    report: Progress,
    on_log: Callable[[Figures], None],
) -> Best | None:
    """Take the steps; whatever ends them early, the last good state is written as a checkpoint."""
    config, folder, total = run.config, found.folder, int(run.config.max_train_steps or 0)
    good, best = found.snapshot, _best_so_far(found)
    pending: list[tuple[Tensor, float]] = []

    def due(every: int | None) -> bool:
        return bool(every) and (run.step == total or run.step % int(every or 1) == 0)

    report("train", run.step, total)
    try:
        while run.step < total and not (selection and selection.exhausted()):
            began = time.perf_counter()
            values = train_step(run, run.step)
            pending.append((values, time.perf_counter() - began))
            run.step += 1
            saving, broken = due(config.checkpointing_steps), False
            if due(LOG_EVERY) or saving:
                lines = _looked_at(run, pending, good.step if good is not None else _newest_step(folder))
                pending = []
                if saving:
                    lines[-1]["validation_loss"] = value = run.processes.mean(validation_loss(run))
                    if selection is not None:
                        scores = _scored(run, selection, best)
                        broken = selection.broken
                        lines[-1] |= scores | ({GIVEN: total} if scores else {})
                        value = 1 - scores.get("score", -math.inf)
                    # Of equal scores (all 0 before the subject is there) the later checkpoint knows more.
                    later = selection is not None and best is not None and value == best.loss
                    if math.isfinite(value) and (best is None or value < best.loss or later):
                        best = Best(run.step, value)
                # What draws nothing is nothing to go on from.
                if run.processes.is_main and not broken and (saving or not config.full):
                    state = (run.parameters, run.optimizer, run.scaler, found.identity, best)
                    # A whole model's state is not copied but written as it is, below.
                    good = checkpoint.capture(run.step, *state, copies=not config.full)
                if run.processes.is_main:
                    folder.append_metrics(lines)
                    for line in lines:
                        logger.log(int(line["step"] or 0), _plotted(line))
                on_log(lines[-1] | {"memory_mb": peak_memory_mb(run.base.device)})
            if saving and not broken and good is not None and run.processes.is_main:
                checkpoint.write(folder.checkpoints, good)
                good = None if config.full else good
            if due(config.validation_steps) and run.step < total and run.processes.is_main:
                _preview(run, folder, logger)
            report("train", run.step, total)
    except BaseException as error:
        saved = _saved_step(run, folder, good)
        if isinstance(error, KeyboardInterrupt) and saved is not None:
            raise type(error)(f"add --resume to go on from step {saved}") from None
        raise
    return best


def _best_so_far(found: Plan) -> Best | None:
    """Return the best step before a resume; where its checkpoint is gone or broken, the best that is left."""
    best, folder = found.snapshot.best if found.snapshot is not None else None, found.folder
    if best is None or checkpoint.is_whole(folder.checkpoint_of(best.step)):
        return best
    left: Best | None = None
    if found.config.select == "best":
        whole = [step for step, path in checkpoint.listed(folder.checkpoints) if checkpoint.is_whole(path)]
        left = best_of(folder.read_metrics(), whole)
    warnings.warn(
        f"{folder.checkpoint_of(best.step)}, the best checkpoint so far, is gone or broken: "
        f"{'nothing' if left is None else f'step {left.step}'} of before stands in its place",
        UserWarning,
        stacklevel=1,
    )
    return left


def _scored(run: Run, selection: Selection, best: Best | None) -> dict[str, float]:
    """Return the model's score and its parts at this step, the mean over processes; nothing early on.

    Raises:
        TrainingError: its pictures are not finite, and none before was scored.
    """
    if run.step < scored_from(run.config):
        return {}
    scores = selection.score(run)
    if run.processes.mean(float(not scores)) > 0:  # all processes stop, whichever of them saw it
        if best is None:
            raise TrainingError(
                f"the model's pictures are not finite at step {run.step}, the first that was scored, so "
                f"there is no checkpoint to choose: lower --learning-rate (it is "
                f"{run.config.learning_rate:g}) or pass --mixed-precision no, and start again"
            )
        warnings.warn(
            f"the model's pictures are not finite any more at step {run.step}: the run ends, and the best "
            "checkpoint before it is kept",
            UserWarning,
            stacklevel=1,
        )
        selection.broken = True
        return {}
    scores = {name: run.processes.mean(value) for name, value in scores.items()}
    selection.note(run.step, scores)
    return scores


def _saved_step(run: Run, folder: RunFolder, good: Snapshot | None) -> int | None:
    """Write the last good state if that is still possible; return the step that a resumed run starts from."""
    if good is not None and run.processes.is_main:
        with suppress(OutputError):  # what ended the run may be a full disk
            checkpoint.write(folder.checkpoints, good)
    return _newest_step(folder)


def _newest_step(folder: RunFolder) -> int | None:
    newest = checkpoint.newest(folder.checkpoints)
    return None if newest is None else int(newest.stem.partition("-")[2])


def _preview(run: Run, folder: RunFolder, logger: Logger) -> None:
    """Draw the sample grid by the model in training, through the very code of `generate`."""
    with run.autocast():
        pictures = draw_samples(run.config, run.base)
    save_pictures(pictures, folder.samples / f"step-{run.step:06d}", overwrite=True)
    logger.images(run.step, {picture.prompt: picture.image for picture in pictures})


def _plotted(line: Figures) -> dict[str, float | int | None]:
    """Return what of a line is a curve."""
    return {name: value for name, value in line.items() if name not in ("step", GIVEN)}


def _looked_at(
    run: Run, pending: Sequence[tuple[Tensor, float]], good: int | None
) -> list[dict[str, float | int | None]]:
    """Return the steps' lines of the metrics; stop at a loss that is not finite, or at endless overflow."""
    first = run.step - len(pending)
    rows = run.processes.average(torch.stack([values for values, _ in pending])).tolist()
    lines: list[dict[str, float | int | None]] = []
    kept = "start again" if good is None else f"add --resume to go on from step {good}"
    # The scale began at 65,536 and halves at each overflow.
    if run.scaler.is_enabled() and run.scaler.get_scale() < 1:
        raise TrainingError(
            f"the gradients overflow in fp16 at step {run.step}, however small the loss is scaled: pass "
            f"--mixed-precision bf16 or no, and {kept}"
        )
    for number, (row, (_, seconds)) in enumerate(zip(rows, pending, strict=True), start=first + 1):
        # In fp16 a gradient may overflow: the scaler skips that step and goes on with a smaller scale.
        checked = row[:3] if run.precision == "fp16" else row
        if not all(math.isfinite(value) for value in checked):
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
    return lines
