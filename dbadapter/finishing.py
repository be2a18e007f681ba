"""The end of a run: the adapter's file, proved equal to what was trained; samples; the model card."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dbadapter import checkpoint
from dbadapter.adapter import Adapter
from dbadapter.adapter_file import verify, write_adapter
from dbadapter.base import Base, load_base
from dbadapter.checkpoint import Best
from dbadapter.config import TrainConfig
from dbadapter.diffusers_check import Skeleton, check_file
from dbadapter.lora import apply, collect
from dbadapter.model_card import Made, describe, draw_samples, last_losses, model_card
from dbadapter.model_folder import write_model_folder
from dbadapter.preparation import Run
from dbadapter.run_folder import RunFolder, write_text
from dbadapter.sampling import Picture, save_pictures, write_png
from dbadapter.selection import chosen_step, curve
from dbadapter.speed import DTYPES, peak_memory_mb

__all__ = ["TrainResult", "Trained", "finished_result", "result_of", "write_results"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainResult:
    """What a run left, and what it took.

    Args:
        adapter_path: the file to share; with `full` the model's folder.
        config: resolved.
        steps: optimizer steps of the adapter, those before a resume included.
        seconds: wall time of this call, loading and samples included.
        peak_memory_mb: of the process so far, or of the GPU where there is one; 1 MB = 2**20 bytes.
        metrics_path: one JSON object a step.
        sample_paths: the sample pictures, then their grid.
        instance_loss, prior_loss: means over the last tenth of the steps; None without a prior.
        best_path: the adapter of the step with the lowest validation loss, where that is not the last one.
        chosen_step: the step that became the file, with select "best".
        last_path: the last step's adapter, where select "best" chose another and the last one draws.
        finished_before: the run was complete already; nothing was changed.
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
    best_path: Path | None = None
    chosen_step: int | None = None
    last_path: Path | None = None
    finished_before: bool = False


@dataclass(frozen=True)
class Trained:
    """What training gave, free of the models that it was trained on.

    Args:
        made: what the adapter was made of.
        device: that it was trained on.
        adapter: that becomes the file; None with `full`.
        skeleton: names and shapes of the models that carry the adapter; None with `full`.
        weights: component -> state dict of the models, with `full`.
        other: the adapter of another step that is kept beside it: the one with the lowest validation loss,
            or with select "best" the last one; None where it is the same.
        other_step: that step.
    """

    made: Made
    device: torch.device
    adapter: Adapter | None
    skeleton: Skeleton | None
    weights: Mapping[str, Mapping[str, Tensor]] | None
    other: Adapter | None = None
    other_step: int | None = None

    @classmethod
    def of(
        cls,
        made: Made,
        run: Run,
        family: str,
        best: Best | None,
        folder: RunFolder,
        *,
        keep_last: bool = True,
    ) -> Trained:
        """Read the trained state out of a run, and its best one from the checkpoint.

        Args:
            keep_last: the last step's adapter is kept where another step's was chosen.
        """
        base, config, choosing = run.base, run.config, run.config.select == "best"
        path = folder.checkpoint_of(best.step) if best is not None and best.step != made.steps else None
        earlier = best.step if best is not None and path is not None and path.exists() else None
        if choosing:
            made = replace(made, chosen_step=earlier or made.steps)
        if config.full:
            if choosing and earlier is not None:
                _go_back(run, folder, earlier)
            models = {"unet": base.unet} | (base.text_encoders if config.train_text_encoder else {})
            weights = {name: model.state_dict() for name, model in models.items()}
            return cls(made, base.device, None, None, weights)
        texts = base.text_encoders if config.train_text_encoder else {}

        def adapter() -> Adapter:
            first, second = texts.get("text_encoder"), texts.get("text_encoder_2")
            return collect(base.unet, first, family, text_encoder_2=second)

        last, skeleton = adapter(), Skeleton(base.unet, texts)
        if earlier is None:
            return cls(made, base.device, last, skeleton, None)
        _go_back(run, folder, earlier)
        if choosing and keep_last:
            return cls(made, base.device, adapter(), skeleton, None, last, made.steps)
        if choosing:
            return cls(made, base.device, adapter(), skeleton, None)
        return cls(made, base.device, last, skeleton, None, adapter(), earlier)


def write_results(trained: Trained, folder: RunFolder, report: Progress) -> None:
    """Write the adapter, or with `full` the model's folder, then samples and the model card.

    Written before the samples are drawn, by a base loaded anew: nothing can lose the adapter then, and the
    samples show what the file does, not what the model in memory does. The file is read back twice: as
    dbadapter reads it, bit for bit, and by diffusers' own loader.

    Raises:
        AdapterError: what is read back is not what was trained.
        OutputError: it cannot be written; the last checkpoint stays, so that --resume finishes the run.
    """
    made, config = trained.made, trained.made.config
    description = describe(made)
    if trained.adapter is None:
        _write_model(trained, folder)
    else:
        write_adapter(
            folder.adapter, trained.adapter, description=description, sidecars=False, overwrite=True
        )
        verify(folder.adapter, trained.adapter)
        if trained.skeleton is not None:
            # Now, before minutes of sampling: the file that is written then differs by its preview alone.
            check_file(folder.adapter, trained.skeleton)
    for path in (folder.best_adapter, folder.last_adapter):
        path.unlink(missing_ok=True)
    if trained.other is not None:
        beside = folder.best_adapter if made.chosen_step is None else folder.last_adapter
        other = replace(description, max_train_steps=trained.other_step)
        write_adapter(beside, trained.other, description=other, sidecars=False, overwrite=True)
        if trained.skeleton is not None:
            check_file(beside, trained.skeleton)
    folder.curve.unlink(missing_ok=True)
    if (drawn := curve(folder.read_metrics(), made.chosen_step)) is not None:
        write_png(drawn, folder.curve)
    folder.settle()
    folder.drop_other_kind(full=config.full)
    pictures = _samples(trained, folder, report)
    save_pictures(pictures, folder.samples, overwrite=True)
    if trained.adapter is not None:
        preview = pictures[0].image
        write_adapter(
            folder.adapter, trained.adapter, description=description, preview=preview, overwrite=True
        )
        verify(folder.adapter, trained.adapter)
    if not folder.config.exists():  # somebody removed the folder meanwhile
        write_text(folder.config, config.to_toml())
    write_text(folder.card, model_card(made))


def result_of(trained: Trained, folder: RunFolder, seconds: float) -> TrainResult:
    """Return what a run left, once it is written."""
    return _result(
        trained.made.config,
        folder,
        trained.made.steps,
        seconds,
        peak_memory_mb(trained.device),
        trained.made.last_losses,
        chosen_step=trained.made.chosen_step,
    )


def finished_result(config: TrainConfig, folder: RunFolder, seconds: float) -> TrainResult:
    """Return what a run left that was complete before this call."""
    history = folder.read_metrics()
    steps = int(history[-1]["step"] or 0) if history else 0
    chosen = chosen_step(history) or steps if config.select == "best" else None
    losses = last_losses(history)
    return _result(config, folder, steps, seconds, 0.0, losses, chosen_step=chosen, finished_before=True)


def _result(
    config: TrainConfig,
    folder: RunFolder,
    steps: int,
    seconds: float,
    memory: float,
    losses: Mapping[str, float | None],
    *,
    chosen_step: int | None = None,
    finished_before: bool = False,
) -> TrainResult:
    numbered = sorted(path for path in folder.samples.glob("*.png") if path.stem.isdigit())
    grid = folder.samples / "grid.png"
    return TrainResult(
        adapter_path=folder.model if config.full else folder.adapter,
        config=config,
        steps=steps,
        seconds=seconds,
        peak_memory_mb=memory,
        metrics_path=folder.metrics,
        sample_paths=(*numbered, *([grid] if grid.exists() else [])),
        instance_loss=losses["instance_loss"] or 0.0,
        prior_loss=losses["prior_loss"],
        best_path=folder.best_adapter if folder.best_adapter.exists() else None,
        chosen_step=chosen_step,
        last_path=folder.last_adapter if folder.last_adapter.exists() else None,
        finished_before=finished_before,
    )


def _go_back(run: Run, folder: RunFolder, step: int) -> None:
    """Put a checkpoint's state into the run."""
    snapshot = checkpoint.read(folder.checkpoint_of(step))
    checkpoint.restore(snapshot, run.parameters, run.optimizer, run.scaler)


def _write_model(trained: Trained, folder: RunFolder) -> None:
    """Write the models that were trained whole, with the parts that were not, as a diffusers folder."""
    config = trained.made.config
    base = load_base(config.base, device="cpu", prediction_type=config.prediction_type)
    for component, state in (trained.weights or {}).items():
        getattr(base.pipeline, component).load_state_dict(state)
    write_model_folder(base.pipeline, folder.model)


def _samples(trained: Trained, folder: RunFolder, report: Progress) -> list[Picture]:
    """Return the sample pictures, by the adapter's file on a base loaded anew."""
    config = trained.made.config
    gc.collect()  # the trained models, before the same are loaded once more
    # In the fast precision on a GPU; on a CPU a few pictures do not pay for rounding.
    dtype = DTYPES[trained.made.precision] if trained.device.type == "cuda" else torch.float32
    spec = str(folder.model) if config.full else config.base
    base: Base = load_base(spec, device=trained.device, dtype=dtype, prediction_type=config.prediction_type)
    if config.full:
        return draw_samples(config, base, None, report)
    apply(base.pipeline, {folder.adapter: 1.0})
    return draw_samples(config, base, folder.adapter, report)
