"""How much memory a run will take, asked of models without weights: seconds, whatever their size.

The models lie on the meta device, where operations have shapes and dtypes but no data. A step is taken there,
and the bytes of all tensors alive are counted as they come and go.

Measured on a CPU, every tensor in pages of its own (MALLOC_MMAP_THRESHOLD_=65536), a step of SD1.5 at 256
pixels, batch 2, in float32 takes about 680 MB beside the weights. Counted are 484: oneDNN lays the weights of
convolutions out anew, in memory that is no tensor's. In glibc's heap, as in training, it is 800 to 900.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dbadapter.base import Precision
from dbadapter.data import encoded_at_once
from dbadapter.lean import keep_less, pays
from dbadapter.lora import adapters_off
from dbadapter.sampling import DECODED_TOGETHER
from dbadapter.speed import DTYPES, PLAIN_ATTENTION_TOKENS, checkpoint_layers, shorten_adapters

__all__ = ["Estimate", "estimate", "peak_bytes"]

MB = 2**20
# Only on CPUs: Python with torch, diffusers, transformers and peft, their kernels used once; and the heap's
# holes. Rather too much than too little: SD1.5's steps at 256 px come to 5,620 and 3,410 MB in float32 and
# bfloat16, where 4,960 and 3,280 were measured (benchmarks/results/training-sd15.json, imports included).
PROCESS_MB = 550.0
_OF_ACTIVATIONS = 0.5
_OF_WEIGHTS = 0.15  # oneDNN lays every convolution's weight out anew: large pieces come and go
_MOMENT_BYTES = {"adamw": 8.0, "adamw8bit": 2.03, "prodigy": 16.0}  # a trainable value; see `optimizers`

# What torch.autocast runs in the lower precision and in float32, of what these models call
# (torch.amp's documentation lists both; on CPUs, norms and softmax run in the dtype of their input).
_LOWER = {"conv2d", "linear", "matmul", "__matmul__", "bmm", "baddbmm", "scaled_dot_product_attention"}
_FLOAT32_ON_CUDA = {"group_norm", "layer_norm", "softmax", "mse_loss"}


@dataclass(frozen=True)
class Estimate:
    """What a run takes at its peak, in units of 2**20 bytes.

    Args:
        frozen_mb: weights that are not trained, of the models that stay while training, as they lie then;
            with `full` the teacher's too.
        trainable_mb: trained weights, their gradients and the optimizer's state.
        activations_mb: what a step takes on top of both at its peak, without gradient accumulation.
        encode_mb: the VAE's activations while the photographs are encoded.
        decode_mb: the VAE's activations while sample pictures are decoded.
        overhead_mb: what Python, its libraries and holes in the heap take while training; 0 on a GPU.
        peak_mb: the most of all phases.
    """

    frozen_mb: float
    trainable_mb: float
    activations_mb: float
    encode_mb: float
    decode_mb: float
    overhead_mb: float
    peak_mb: float


def estimate(
    unet: Any,
    text_encoders: Sequence[Any],
    vae: Any,
    *,
    latent_shape: tuple[int, int, int],
    text_length: int,
    batch_samples: int,
    precision: Precision,
    device_type: str,
    prior: str = "none",
    train_text_encoder: bool = False,
    gradient_checkpointing: bool = False,
    lean: bool = False,
    previews: bool = False,
    optimizer: str = "adamw",
    encode_batch: int | None = None,
    decode_batch: int | None = None,
) -> Estimate:
    """Return what a run takes; the models are used up: cast, and set to train.

    Args:
        unet, text_encoders: on the meta device, float32, after `lora.inject`; what asks for a gradient is
            trained (in a full fine-tuning, everything).
        vae: on the meta device.
        latent_shape: of one sample, (channels, height, width).
        text_length: tokens of a prompt.
        batch_samples: instance samples of a forward pass; a prior adds as many.
        precision: as `pick_precision` returns it.
        device_type: "cpu" or "cuda", which differ in what autocast does and in the attention.
        prior: "distill" (the teacher's pass comes before the step's own), "generated" or "none".
        train_text_encoder: whether the text encoders run, and learn, in every step.
        lean: whether frozen layers may keep less: not with --full or --compile.
        previews: whether pictures are drawn on the way, for which VAE and text encoders stay.
        optimizer: of `optimizers.OPTIMIZERS`.
        encode_batch, decode_batch: pictures that the VAE takes at once; None is as `LatentCache.encode`
            and `sampling.generate_pictures`.
    """
    for model in text_encoders if not train_text_encoder else ():
        model.requires_grad_(False)
    vae.requires_grad_(False)
    models = [unet, *text_encoders]
    loaded = _bytes(parameter for model in (*models, vae) for parameter in model.parameters())
    height, width = latent_shape[1:]
    _prepare(models, precision, device_type, height * width, gradient_checkpointing, lean and pays(unet))
    trained = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(p.numel() * (p.element_size() * 2 + _MOMENT_BYTES[optimizer]) for p in trained)
    staying = (*models, vae) if previews else (unet, *(text_encoders if train_text_encoder else ()))
    frozen = _bytes(p for model in staying for p in model.parameters() if not p.requires_grad)
    if prior == "distill" and all(parameter.requires_grad for parameter in unet.parameters()):
        # Trained whole, the UNet has no adapter to turn off: the teacher is a copy from before.
        frozen += sum(parameter.numel() for parameter in unet.parameters()) * DTYPES[precision].itemsize

    encoders = text_encoders if train_text_encoder else ()
    teacher = batch_samples if prior == "distill" else 0
    samples = batch_samples * (1 if prior == "none" else 2)
    mode = _Autocast(DTYPES[precision], device_type)
    step = peak_bytes(lambda: _step(unet, encoders, mode, latent_shape, text_length, samples, teacher))
    # Gradients are among the tensors that the step leaves; they are counted as trainable.
    activations = max(0, step - _bytes(trained))
    for parameter in trained:
        parameter.grad = None
    side = 2 ** (len(vae.config.block_out_channels) - 1)
    with _Autocast(torch.float32, device_type), torch.no_grad():
        at_once = encode_batch or encoded_at_once(height * width * side**2)
        pixels = (at_once, 3, height * side, width * side)
        encode = peak_bytes(lambda: vae.encode(torch.zeros(pixels, device="meta")))
        together = 4 if height * width * side**2 <= DECODED_TOGETHER else 1
        latents = (decode_batch or together, *latent_shape)
        decode = peak_bytes(lambda: vae.decode(torch.zeros(latents, device="meta")))
    # The photographs are encoded when the weights are cast already, if they will be. The samples are drawn by
    # a base loaded anew: in the run's precision, VAE and all, on a GPU, in float32 on a CPU.
    if device_type != "cpu":
        decode = decode * DTYPES[precision].itemsize // 4
    sampling = loaded if device_type == "cpu" else loaded * DTYPES[precision].itemsize // 4
    cast = _bytes(parameter for model in (*models, vae) for parameter in model.parameters())
    phases = ((loaded, 0), (cast, encode), (frozen + trainable, activations), (sampling, decode))
    overheads = [_overhead(weights, tensors, device_type) for weights, tensors in phases]
    peak = max(sum(phase) + overhead for phase, overhead in zip(phases, overheads, strict=True))
    return Estimate(
        frozen_mb=frozen / MB,
        trainable_mb=trainable / MB,
        activations_mb=activations / MB,
        encode_mb=encode / MB,
        decode_mb=decode / MB,
        overhead_mb=overheads[2] / MB,
        peak_mb=peak / MB,
    )


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made inside `run` take at one time.

    A storage counts once, however many views it has, until nothing holds it any more: neither Python nor
    autograd. Works on the meta device, where it costs nothing. Tensors from before do not count.
    """
    counter = _StorageCounter()
    with counter:
        result = run()
        del result
    return counter.peak


class _StorageCounter(TorchDispatchMode):
    """Sees every operation below autograd, forward and backward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._note(leaf, counted=False)  # views of a weight are no new memory
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._note(leaf, counted=True)
        self.peak = max(self.peak, self.current)
        return result

    def _note(self, leaf: Any, *, counted: bool) -> None:
        if not isinstance(leaf, Tensor):
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0
        self.current += size

        def gone(_: Any) -> None:
            self.current -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)


class _Autocast(TorchFunctionMode):
    """Casts as torch.autocast does, which the meta device does not have, and has a fused attention."""

    def __init__(self, dtype: torch.dtype, device_type: str) -> None:
        super().__init__()
        self._dtype = dtype
        self._float32 = _FLOAT32_ON_CUDA if device_type == "cuda" else set[str]()
        self._casts: dict[int, Tensor] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._casts.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self._dtype != torch.float32:
            wanted = self._dtype if name in _LOWER else torch.float32 if name in self._float32 else None
            if wanted is not None:
                args = tuple(self._cast(value, wanted) for value in args)
                kwargs = {key: self._cast(value, wanted) for key, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3] if len(args) >= 3 else [kwargs[n] for n in ("query", "key", "value")]
            return _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad and torch.is_grad_enabled()):
            return value.to(dtype)
        # As autocast: casts of trained weights are kept until the block ends.
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(dtype)
        return self._casts[id(value)]


class _FusedAttention(torch.autograd.Function):
    """Attention that keeps no number for each pair of tokens, as on CUDA and, beyond a size, on CPUs.

    torch decides between its kernels by the device, and on the meta device for the plain one.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _prepare(
    models: Sequence[Any],
    precision: Precision,
    device_type: str,
    tokens: int,
    gradient_checkpointing: bool,
    lean: bool,
) -> None:
    """Do what `training.prepare` does to the models, as far as it costs or saves memory."""
    from diffusers.models.attention_processor import AttnProcessor

    for model in models:
        shorten_adapters(model)
        if lean:
            keep_less(model)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[precision])
        if gradient_checkpointing:
            checkpoint_layers(model)
    if device_type == "cpu" and tokens <= PLAIN_ATTENTION_TOKENS[precision]:
        models[0].set_attn_processor(AttnProcessor())


def _step(
    unet: Any,
    text_encoders: Sequence[Any],
    mode: _Autocast,
    latent_shape: Sequence[int],
    text_length: int,
    samples: int,
    teacher: int,
) -> None:
    """Take a training step up to the gradients, as `training.train_step` does."""
    config = unet.config
    x_t = torch.zeros(samples, *latent_shape, device="meta")
    target = torch.zeros_like(x_t)
    timesteps = torch.zeros(samples, dtype=torch.int64, device="meta")
    embeddings = torch.zeros(samples, text_length, config.cross_attention_dim, device="meta")
    more: dict[str, Any] = {}
    if config.addition_embed_type == "text_time":  # SDXL: pooled embedding and six numbers of the cropping
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        time_ids = torch.zeros(samples, 6, device="meta")
        more = {"text_embeds": torch.zeros(samples, pooled, device="meta"), "time_ids": time_ids}
    with mode:
        if teacher:
            part = {key: value[:teacher] for key, value in more.items()}
            with torch.no_grad(), adapters_off(unet):
                unet(x_t[:teacher], timesteps[:teacher], embeddings[:teacher], added_cond_kwargs=part)
        ids = torch.zeros(samples, text_length, dtype=torch.int64, device="meta")
        hidden = [encoder(ids).last_hidden_state for encoder in text_encoders]
        if hidden:
            embeddings = torch.cat(hidden, dim=-1)
        model_pred = unet(x_t, timesteps, embeddings, added_cond_kwargs=more).sample
        loss = F.mse_loss(model_pred.float(), target)
    with mode:  # gradient checkpointing computes the forward pass again, under the same casts
        # Not loss.backward(): the mode would see that call, and be off inside it.
        torch.autograd.Variable._execution_engine.run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )


def _overhead(weights: float, activations: float, device_type: str) -> float:
    if device_type != "cpu":
        return 0.0
    return PROCESS_MB * MB + _OF_WEIGHTS * weights + _OF_ACTIVATIONS * activations


def _bytes(parameters: Iterator[nn.Parameter] | Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
