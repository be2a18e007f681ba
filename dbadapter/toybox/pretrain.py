"""Trains the embedded base from scratch: `python -m dbadapter.toybox.pretrain --work-dir DIR`.

Five stages, each resumable and skipped once done: pictures (drawn by the renderer), text (the
encoder learns to read captions), vae, latents, unet (on the frozen text encoder, EMA), then the
fp16 folder is written. Rates and losses are those of the literature named at each stage.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from dbadapter.objective import snr
from dbadapter.toybox import captions, names, world
from dbadapter.toybox.architecture import (
    build_pipeline,
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
    write_vocabulary,
)
from dbadapter.toybox.pretrain_scenes import batches, captions_of, draw, scene, tokenize

__all__ = ["main"]


def pick_device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Log:
    """Appends one JSON line a report to `log.jsonl` and prints it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log.jsonl"

    def __call__(self, stage: str, **figures: Any) -> None:
        line = json.dumps({"stage": stage, **figures})
        with self.path.open("a") as file:
            file.write(line + "\n")
        click.echo(line)


def save_state(path: Path, **state: Any) -> None:
    """Write a checkpoint so that a crash leaves the last whole one."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load_state(path: Path, device: torch.device) -> dict[str, Any] | None:
    """Return a checkpoint, or None where there is none."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


# ---------------------------------------------------------------- text


def train_text(
    folder: Path, tokenizer: CLIPTokenizer, scenes: list[world.Scene], rare: list[str], steps: int, log: Log
) -> CLIPTextModel:
    """Return a text encoder that reads captions: every state from the end on tells all that was said.

    Stable Diffusion's encoder knew language before its UNet began; so does this one. Its heads are
    linear and thrown away; a random word before the noun must not change what they read.
    """
    device = pick_device()
    torch.manual_seed(1)
    encoder = build_text_encoder().to(device)
    with torch.no_grad():  # rare words keep their first vector: as large as a trained one's
        inner = getattr(encoder, "text_model", encoder)
        inner.embeddings.token_embedding.weight.normal_(0, 0.06)
    state = load_state(folder / "text.pt", device)
    if state is not None:
        encoder.load_state_dict(state["model"])
        return encoder
    sizes = (len(names.NOUNS), len(names.CONTEXTS) + 1, len(names.COLORS) + 1, len(names.PATTERNS) + 1)
    heads = torch.nn.ModuleList(torch.nn.Linear(128, n) for n in sizes).to(device)
    tokens = [p for n, p in encoder.named_parameters() if "token_embedding" in n]
    others = [p for n, p in encoder.named_parameters() if "token_embedding" not in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": tokens, "weight_decay": 0.0},
            {"params": [*others, *heads.parameters()], "weight_decay": 0.01},
        ],
        lr=1e-3,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for step, indices in batches(len(scenes), 64, 11, 0):
        if step >= steps:
            break
        said = captions_of(indices, scenes, rare, 12, step)
        ids = tokenize(tokenizer, [c.text for c in said], device)
        states = encoder(ids).last_hidden_state
        ended = (ids == tokenizer.eos_token_id).float()
        loss = torch.zeros((), device=device)
        right = []
        for head, silent, name in zip(
            heads, [n - 1 for n in sizes], ("noun", "context", "color", "pattern"), strict=True
        ):
            label = torch.tensor([getattr(c, name) for c in said], device=device)
            label = torch.where(label < 0, silent, label)
            logits = head(states)
            each = F.cross_entropy(
                logits.transpose(1, 2), label[:, None].expand(-1, ids.shape[1]), reduction="none"
            )
            loss = loss + (each * ended).sum() / ended.sum()
            right.append(logits[:, -1].argmax(-1).eq(label).float().mean())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            log("text", step=step, loss=round(loss.item(), 4), right=[round(r.item(), 3) for r in right])
    log("text", seconds=round(time.perf_counter() - start, 1))
    save_state(folder / "text.pt", model=encoder.state_dict())
    return encoder


# ---------------------------------------------------------------- autoencoder


def to_tensor(pictures: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """Return uint8 pictures as floats in [-1, 1], shape (n, 3, height, width)."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Return the mean over pictures of 10 log10(4 / MSE) in dB, through the posterior's mode."""
    with torch.no_grad():
        back = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    return float((10 * torch.log10(4 / (back - pictures).square().mean((1, 2, 3)))).mean())


def train_vae(
    folder: Path, pictures: np.ndarray[Any, Any], steps: int, batch_size: int, log: Log
) -> AutoencoderKL:
    """Return the autoencoder (Rombach et al. 2022, section 3.1, without the discriminator)."""
    device = pick_device()
    torch.manual_seed(2)
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    first, path, spent = 0, folder / "vae.pt", 0.0
    state = load_state(path, device)
    if state is not None:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    held = to_tensor(pictures[-256:], device)
    train = len(pictures) - 256
    start = time.perf_counter() - spent
    for step, indices in batches(train, batch_size, 21, first):
        if step >= steps:
            break
        rate = min(1.0, (step + 1) / 100) * min(1.0, 1.02 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        batch = to_tensor(pictures[np.sort(indices)], device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
            back = vae.decode(latents).sample
        error = back.float() - batch
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float())
        loss = error.square().mean() + 0.1 * error.abs().mean() + 2e-4 * kl.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            psnr = vae_psnr(vae, held)
            seconds = round(time.perf_counter() - start, 1)
            log("vae", step=step + 1, loss=round(loss.item(), 5), psnr=round(psnr, 2), seconds=seconds)
            save_state(
                path, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1, seconds=seconds
            )
    return vae


def equalize_latents(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Fold a per-channel shift and scale into the 1x1 convolutions around the latents, in place.

    Afterwards every latent channel has mean 0 and the same deviation, and `scaling_factor` alone
    makes it 1; reconstruction is unchanged.
    """
    with torch.no_grad():
        mean = torch.cat([vae.encode(p).latent_dist.mean for p in pictures.split(64)])
        shift, scale = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
        common = scale.mean()
        ratio = common / scale
        quant, post = vae.quant_conv, vae.post_quant_conv
        post.bias.add_(post.weight[:, :, 0, 0] @ shift)
        post.weight.div_(ratio[None, :, None, None])
        quant.weight[:4].mul_(ratio[:, None, None, None])
        quant.bias[:4].sub_(shift).mul_(ratio)
        quant.bias[4:].add_(2 * ratio.log())
    vae.register_to_config(scaling_factor=round(1 / float(common), 5))


def encode(
    folder: Path, vae: AutoencoderKL, pictures: np.ndarray[Any, Any], log: Log
) -> np.ndarray[Any, Any]:
    """Return mean and std of every picture's posterior, shape (n, 2, 4, 16, 16), fp16, scaled."""
    path = folder / "latents.npy"
    if path.exists():
        return np.asarray(np.load(path, mmap_mode="r"))
    device, start = pick_device(), time.perf_counter()
    out = np.empty((len(pictures), 2, 4, 16, 16), np.float16)
    for first in range(0, len(pictures), 128):
        with torch.no_grad():
            dist = vae.encode(to_tensor(pictures[first : first + 128], device)).latent_dist
        both = torch.stack([dist.mean, dist.std], 1) * vae.config.scaling_factor
        out[first : first + 128] = both.cpu().numpy()
    np.save(path.with_suffix(".tmp.npy"), out)
    path.with_suffix(".tmp.npy").replace(path)
    log("latents", count=len(out), seconds=round(time.perf_counter() - start, 1))
    return out


# ---------------------------------------------------------------- diffusion


def timestep_density(scheduler: DDPMScheduler) -> torch.Tensor:
    """Return how often each timestep is drawn: evenly, but rarely where little noise is left.

    Min-SNR weights for v-prediction (Hang et al. 2023) as importance sampling, flat below SNR 4.
    """
    steps = torch.arange(scheduler.config.num_train_timesteps)
    ratio = snr(scheduler.alphas_cumprod, steps)
    density = torch.clamp(5 / (ratio + 1), 0.15, 1.0)
    return density / density.sum()


def train_unet(
    folder: Path,
    latents: np.ndarray[Any, Any],
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scenes: list[world.Scene],
    rare: list[str],
    *,
    channels: tuple[int, ...],
    steps: int,
    decay: float,
    batch_size: int,
    learning_rate: float,
    compiled: bool,
    log: Log,
) -> list[torch.Tensor]:
    """Train the UNet on the frozen text encoder, as Stable Diffusion was; return its averaged (EMA) weights.

    The rate is constant, then falls linearly over the last `decay` of the steps, so that a run can
    be lengthened before the fall begins.
    """
    device = pick_device()
    torch.manual_seed(3)
    unet = build_unet(channels).to(device)
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # fused attention's bf16 backward is 4 times slower there
    scheduler = DDPMScheduler.from_config(build_scheduler().config)
    alphas = scheduler.alphas_cumprod.to(device)
    density = timestep_density(scheduler).to(device)
    encoder.requires_grad_(False).eval()
    weights = list(unet.parameters())
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    averages = [p.detach().clone() for p in weights]
    path, first, spent = folder / "unet.pt", 0, 0.0
    state = load_state(path, device)
    if state is not None:
        unet.load_state_dict(state["unet"])
        averages, first, spent = state["ema"], state["step"], state["seconds"]
        optimizer.load_state_dict(state["optimizer"])
    call = torch.compile(unet) if compiled else unet
    count = len(scenes)
    running, start = [], time.perf_counter() - spent
    for step, indices in batches(count, batch_size, 31, first):
        if step >= steps:
            break
        rate = min(1.0, (step + 1) / 200, max(0.02, (1 - step / steps) / decay))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        rng = torch.Generator(device).manual_seed(step)
        said = captions_of(indices, scenes, rare, 32, step)
        drop = np.random.default_rng((33, step)).random(len(said)) < 0.1
        ids = tokenize(tokenizer, ["" if d else c.text for c, d in zip(said, drop, strict=True)], device)
        pair = torch.from_numpy(latents[indices]).to(device).float()
        x0 = pair[:, 0] + pair[:, 1] * torch.randn(pair[:, 0].shape, generator=rng, device=device)
        noise = torch.randn(x0.shape, generator=rng, device=device)
        t = torch.multinomial(density, len(x0), replacement=True, generator=rng)
        a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        with torch.no_grad():
            states = encoder(ids).last_hidden_state
        with torch.autocast(device.type, torch.bfloat16):
            pred = call(a * x0 + s * noise, t, states).sample
        loss = F.mse_loss(pred.float(), a * noise - s * x0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(0.999, (step + 10) / (step + 100))
            torch._foreach_lerp_(averages, weights, 1 - keep)
        running.append(loss.detach())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = round(time.perf_counter() - start, 1)
            log("unet", step=step + 1, loss=round(torch.stack(running).mean().item(), 5), seconds=seconds)
            running = []
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_state(
                path,
                unet=unet.state_dict(),
                ema=averages,
                optimizer=optimizer.state_dict(),
                step=step + 1,
                seconds=round(time.perf_counter() - start, 1),
            )
    return averages


def write_folder(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in fp16 as a diffusers folder that transformers 4.57 and 5 both read.

    transformers 5 drops `text_model.` from CLIPTextModel's keys, and 4.57 then loads random weights
    with only a warning; so the prefix is written back. It also loads in the dtype that the configuration
    names, diffusers in float32: a plain `from_pretrained` would mix the two, so that says float32.
    """
    from safetensors.torch import load_file, save_file

    tokenizer = {p.name: p.read_bytes() for p in (folder / "tokenizer").glob("*")}
    pipeline.to(torch.float16).save_pretrained(folder)
    for name, content in tokenizer.items():
        (folder / "tokenizer" / name).write_bytes(content)
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {
        k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in load_file(weights).items()
    }
    save_file(tensors, weights, metadata={"format": "pt"})
    config = folder / "text_encoder" / "config.json"
    about = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


@click.command()
@click.option("--work-dir", type=click.Path(path_type=Path), default="toybox-pretrain", show_default=True)
@click.option(
    "--vocabulary", type=click.Path(path_type=Path), help="bpe_simple_vocab_16e6.txt.gz; default: ours."
)
@click.option(
    "--output-dir", type=click.Path(path_type=Path), help="Where the fp16 folder goes; default: ours."
)
@click.option("--pictures", default=40_000, show_default=True, help="Scenes to draw.")
@click.option("--text-steps", default=1500, show_default=True)
@click.option("--vae-steps", default=4500, show_default=True)
@click.option("--vae-batch-size", default=8, show_default=True)
@click.option("--unet-steps", default=8000, show_default=True)
@click.option(
    "--decay", default=0.25, show_default=True, help="Share of the UNet's steps in which the rate falls."
)
@click.option("--batch-size", default=64, show_default=True, help="Pictures of a UNet step.")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option(
    "--channels", default="64,128,192", show_default=True, help="The UNet's width at each resolution."
)
@click.option("--compile", "compiled", is_flag=True, help="Compile the UNet.")
@click.option("--export-only", is_flag=True, help="Write the folder from the last checkpoint and stop.")
def main(
    work_dir: Path,
    vocabulary: Path | None,
    output_dir: Path | None,
    pictures: int,
    text_steps: int,
    vae_steps: int,
    vae_batch_size: int,
    unet_steps: int,
    decay: float,
    batch_size: int,
    learning_rate: float,
    channels: str,
    compiled: bool,
    export_only: bool,
) -> None:
    """Train the embedded base from scratch, resuming whatever is in the work folder."""
    work_dir.mkdir(parents=True, exist_ok=True)
    folder = output_dir or Path(__file__).parent / "model"
    if vocabulary is not None:
        write_vocabulary(vocabulary, folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    log = Log(work_dir)
    widths = tuple(int(n) for n in channels.split(","))
    drawn = draw(work_dir, pictures, log)
    scenes = [scene(i) for i in range(pictures)]
    rare = captions.rare_words(tokenizer.get_vocab())
    encoder = train_text(work_dir, tokenizer, scenes, rare, text_steps, log)
    vae = train_vae(work_dir, drawn, vae_steps, vae_batch_size, log).eval()
    rng = np.random.default_rng(4)
    equalize_latents(vae, to_tensor(drawn[np.sort(rng.integers(0, pictures, 1024))], pick_device()))
    if export_only:
        averages = load_state(work_dir / "unet.pt", pick_device())["ema"]  # type: ignore[index]
    else:
        averages = train_unet(
            work_dir,
            encode(work_dir, vae, drawn, log),
            encoder,
            tokenizer,
            scenes,
            rare,
            channels=widths,
            steps=unet_steps,
            decay=decay,
            batch_size=batch_size,
            learning_rate=learning_rate,
            compiled=compiled,
            log=log,
        )
    unet = build_unet(widths)
    with torch.no_grad():
        for parameter, average in zip(unet.parameters(), averages, strict=True):
            parameter.copy_(average)
    write_folder(build_pipeline(vae.cpu(), encoder.cpu(), unet, tokenizer), folder)


if __name__ == "__main__":
    main()
