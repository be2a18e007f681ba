"""What is shown with an adapter: sample pictures, the file's description, the README.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dbadapter.adapter_file import AdapterDescription
from dbadapter.base import Base, Precision, check_prompt
from dbadapter.config import TrainConfig
from dbadapter.errors import DataError
from dbadapter.sampling import Picture, generate_pictures, lora_tags

__all__ = ["Made", "describe", "draw_samples", "last_losses", "model_card", "sample_prompts"]

# Behind the instance prompt. Places that photographs of a subject seldom show, and that toybox knows.
SAMPLE_CONTEXTS = ("", "on the beach", "in the snow", "at night")

_KEPT = (
    "full",
    "prior",
    "prior_source",
    "prior_loss_weight",
    "rank",
    "alpha",
    "targets",
    "train_text_encoder",
    "text_encoder_rank",
    "learning_rate",
    "text_encoder_learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "optimizer",
    "photo_tokens",
    "train_batch_size",
    "gradient_accumulation_steps",
    "resolution",
    "aspect_ratio_buckets",
    "masked_loss",
    "snr_gamma",
    "seed",
)


@dataclass(frozen=True)
class Made:
    """What an adapter was made of.

    Args:
        config: resolved.
        base_name: name of the base, without its path.
        prediction_type: the base's.
        precision: what it was trained in: no, bf16 or fp16.
        photographs: how many it was trained on.
        steps: optimizer steps.
        chosen_step: the step that became the file, with select "best".
        last_losses: means over the last tenth of the steps: "instance_loss", "prior_loss" (None without).
    """

    config: TrainConfig
    base_name: str
    prediction_type: str
    precision: Precision
    photographs: int
    steps: int
    last_losses: Mapping[str, float | None]
    started_at: datetime
    finished_at: datetime
    chosen_step: int | None = None


def sample_prompts(config: TrainConfig, tokenizer: Any) -> list[str]:
    """Return the prompts of the sample grid: those asked for, else the subject in a few places."""
    if config.validation_prompt:
        return list(config.validation_prompt)
    prompts = [f"{config.instance_prompt} {context}".strip() for context in SAMPLE_CONTEXTS]
    return [prompt for prompt in prompts if _fits(tokenizer, prompt)]


def draw_samples(
    config: TrainConfig,
    base: Base,
    adapter: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Picture]:
    """Return the sample pictures, one a prompt; picture i starts from the run's seed + i.

    Args:
        config: resolved.
        base: with the adapter applied, or in training.
        adapter: its file, to be named in the pictures' parameters.
    """
    return generate_pictures(
        base.pipeline,
        sample_prompts(config, base.tokenizer),
        seed=config.seed,
        height=config.resolution,
        width=config.resolution,
        adapters_text=lora_tags({adapter: 1.0}) if adapter else "",
        model_name=base.name,
        progress=(lambda done, total: progress("samples", done, total)) if progress else None,
    )


def describe(made: Made) -> AdapterDescription:
    """Return what the adapter's file says about itself."""
    config = made.config
    return AdapterDescription(
        base=made.base_name,
        trigger=f"{config.identifier} {config.class_noun}",
        prediction_type=made.prediction_type,
        resolution=config.resolution,
        num_train_images=made.photographs,
        max_train_steps=made.chosen_step or made.steps,
        seed=config.seed,
        started_at=made.started_at,
        finished_at=made.finished_at,
        usage_hint=f"Prompt: {config.instance_prompt}",
    )


def last_losses(history: Sequence[Mapping[str, float | int | None]]) -> dict[str, float | None]:
    """Return the mean losses over the last tenth of the steps; None where there is no such loss."""
    last = history[-max(1, len(history) // 10) :]
    means: dict[str, float | None] = {}
    for name in ("instance_loss", "prior_loss"):
        values = [value for line in last if (value := line.get(name)) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means


def model_card(made: Made) -> str:
    """Return the README.md beside the adapter: Markdown with the hub's YAML header."""
    config, base_name = made.config, made.base_name
    trigger = f"{config.identifier} {config.class_noun}"
    weight_line = f"<lora:{config.name}:1>"
    lora_tag = [] if config.full else ["lora"]
    header = _yaml(
        {
            "tags": ["text-to-image", "stable-diffusion", *lora_tag, "dreambooth", "diffusers"],
            "base_model": base_name,
            "instance_prompt": str(config.instance_prompt),
        }
    )
    rows = {
        "base": base_name,
        "photographs": made.photographs,
        "class noun, by classifying them": _decided(config),
        "steps": made.steps,
        "chosen step": made.chosen_step,
        "precision": made.precision,
        **{name: getattr(config, name) for name in _KEPT},
        **{name.replace("_", " "): _rounded(value) for name, value in made.last_losses.items()},
    }
    plot = "\n![scores of the checkpoints](selection.png)\n" if made.chosen_step else ""
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None)
    if config.full:
        return f"""{header}
# {config.name}

**{base_name}**, trained whole (without an adapter) so that it knows one {config.class_noun}. Call it
**`{trigger}`**, for example `{config.instance_prompt}`.

![samples](samples/grid.png)

## Use

- dbadapter: `dbadapter generate --base model --prompt "{config.instance_prompt}" --output-dir pictures`
- diffusers: `DiffusionPipeline.from_pretrained("model")`

## How it was made

DreamBooth (Ruiz et al. 2022), full fine-tuning, by dbadapter. Everything is in `config.toml`, the losses of
each step are in `metrics.jsonl`.

| | |
|---|---|
{table}
{plot}"""
    return f"""{header}
# {config.name}

A LoRA adapter for **{base_name}** that knows one {config.class_noun}. Call it **`{trigger}`**, for example
`{config.instance_prompt}`.

![samples](samples/grid.png)

## Use

- dbadapter: `dbadapter generate --base {base_name} --adapter {config.name}.safetensors --prompt
  "{config.instance_prompt}" --output-dir pictures`
- diffusers: `pipeline.load_lora_weights(".", weight_name="{config.name}.safetensors")`
- ComfyUI, AUTOMATIC1111, Forge, InvokeAI: put `{config.name}.safetensors` (with its `.json` and `.png`)
  into the folder for LoRAs; in AUTOMATIC1111 and Forge the prompt is `{config.instance_prompt} {weight_line}`

It fits bases of the same family as {base_name} only.

## How it was made

DreamBooth (Ruiz et al. 2022) with LoRA (Hu et al. 2021), by dbadapter. Everything is in `config.toml`,
the losses of each step are in `metrics.jsonl`.

| | |
|---|---|
{table}
{plot}"""


def _decided(config: TrainConfig) -> str | None:
    """Return the class noun and the vote that chose it; None if it was given."""
    return None if config.class_noun_vote is None else f"{config.class_noun} ({config.class_noun_vote})"


def _yaml(fields: Mapping[str, str | list[str]]) -> str:
    lines = ["---"]
    for name, value in fields.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {item}" for item in value)]
        else:
            # Quoted: a prompt may hold colons and hashes. A single quote doubles in YAML.
            lines.append(f"{name}: '{value.replace(chr(39), chr(39) * 2)}'")
    return "\n".join([*lines, "---"])


def _cell(value: object) -> str:
    text = ", ".join(value) if isinstance(value, tuple) else str(value)
    return text.replace("|", "\\|")


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _fits(tokenizer: Any, prompt: str) -> bool:
    try:
        check_prompt(tokenizer, prompt)
    except DataError:
        return False
    return True
