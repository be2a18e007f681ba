"""Injection, reading out, applying and merging on a live model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dbadapter import keys, lora
from dbadapter.adapter import Adapter, LoraWeights, adaptable_layers, check_fits, delta
from dbadapter.adapter_file import write_adapter
from dbadapter.errors import AdapterError, ConfigError

ALL_TARGETS = ("attention", "feed-forward", "proj", "conv")


@pytest.fixture(scope="module")
def tiny(tiny_base_folder: Path) -> Any:
    """Give the tiny base as a plain diffusers pipeline; tests take copies of it."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        tiny_base_folder, local_files_only=True, safety_checker=None
    )


@pytest.fixture
def load(tiny: Any) -> Callable[[], Any]:
    """Give a function that returns a pipeline with fresh copies of the models that adapters change."""

    def copied() -> Any:
        own = {name: copy.deepcopy(tiny.components[name]) for name in ("unet", "text_encoder")}
        return type(tiny)(**{**tiny.components, **own}, requires_safety_checker=False)

    return copied


@pytest.fixture
def pipeline(load: Callable[[], Any]) -> Any:
    return load()


def predict(pipeline: Any) -> Tensor:
    """Return the UNet's output for fixed inputs; the text encoder's change is in it."""
    generator = torch.Generator().manual_seed(3)
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    width = next(layer for name, layer in adaptable_layers(unet, "unet").items() if name.endswith("conv_in"))
    latents = torch.randn(2, width.weight.shape[1], 8, 8, generator=generator)
    ids = torch.randint(0, 90, (2, 12), generator=generator)
    with torch.no_grad():
        embeddings = text_encoder(ids)[0]
        timesteps = torch.tensor([10, 500])
        result: Tensor = unet(latents, timesteps, encoder_hidden_states=embeddings).sample
    return result


def train(parameters: lora.TrainableParameters, seed: int = 5, strength: float = 0.1) -> None:
    """Stand in for training: give every factor a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*parameters.unet, *parameters.text_encoder]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * strength)


def trained_adapter(pipeline: Any, seed: int = 5, **options: Any) -> Adapter:
    """Return an adapter with an effect, and leave the pipeline as it was."""
    train(lora.inject(pipeline.unet, pipeline.text_encoder, **{"rank": 4, **options}), seed)
    adapter = lora.collect(pipeline.unet, pipeline.text_encoder, "sd1")
    lora.remove(pipeline.unet, pipeline.text_encoder)
    return adapter


def state(pipeline: Any) -> Iterator[tuple[str, Tensor]]:
    yield from pipeline.unet.state_dict().items()
    yield from pipeline.text_encoder.state_dict().items()


def test_injection_changes_nothing_at_first(pipeline: Any) -> None:
    before, random_state = predict(pipeline), torch.get_rng_state()
    parameters = lora.inject(pipeline.unet, pipeline.text_encoder, rank=4, targets=ALL_TARGETS)
    assert torch.equal(torch.get_rng_state(), random_state)  # torch's global generator is others'
    assert torch.equal(predict(pipeline), before)
    assert parameters.unet
    assert parameters.text_encoder


def test_only_the_factors_are_trained(pipeline: Any) -> None:
    parameters = lora.inject(pipeline.unet, pipeline.text_encoder, rank=2)
    trainable = {
        id(p) for m in (pipeline.unet, pipeline.text_encoder) for p in m.parameters() if p.requires_grad
    }
    assert trainable == {id(p) for p in [*parameters.unet, *parameters.text_encoder]}


def test_factors_are_float32_on_a_bfloat16_base(pipeline: Any) -> None:
    pipeline.unet.to(torch.bfloat16)
    parameters = lora.inject(pipeline.unet, None, rank=2)
    assert {p.dtype for p in parameters.unet} == {torch.float32}
    assert parameters.text_encoder == []


def test_the_seed_decides_and_the_text_encoder_does_not(load: Callable[[], Any]) -> None:
    def first(seed: int, with_text: bool) -> list[nn.Parameter]:
        pipeline = load()
        return lora.inject(
            pipeline.unet, pipeline.text_encoder if with_text else None, rank=2, seed=seed
        ).unet

    reference = first(1, True)
    assert all(torch.equal(a, b) for a, b in zip(reference, first(1, False), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(reference, first(2, True), strict=True))


def test_ranks_alphas_and_names(pipeline: Any) -> None:
    lora.inject(
        pipeline.unet, pipeline.text_encoder, rank=4, alpha=2, text_encoder_rank=3, targets=ALL_TARGETS
    )
    adapter = lora.collect(pipeline.unet, pipeline.text_encoder, "sd1", {"ss_seed": "1"})
    unet, text = adapter.of_component("unet"), adapter.of_component("text_encoder")
    assert {(w.rank, w.alpha) for w in unet.values()} == {(4, 2.0)}
    assert {(w.rank, w.alpha) for w in text.values()} == {(3, 3.0)}
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in text)
    assert {name.rpartition(".")[2] for name in text} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    left_out = set(adaptable_layers(pipeline.unet, "unet")) - set(unet)
    assert {name.split(".")[1] for name in left_out} == {"conv_in", "conv_out", "time_embedding"}
    assert adapter.metadata == {"ss_seed": "1"}


def test_sizes_on_the_true_stable_diffusion_1() -> None:
    """Known sizes: the UNet's attention has 199,296 r parameters, CLIP-L's 73,728 r."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # every other default is SD1's
        text_encoder = CLIPTextModel(CLIPTextConfig(**clip))
    for model, component, layers, size in (
        (unet, "unet", 128, 199_296),
        (text_encoder, "text_encoder", 48, 73_728),
    ):
        found = lora.target_layers(model, component, ["attention"])
        assert len(found) == layers
        assert sum(sum(layer.get_parameter("weight").shape) for layer in found.values()) == size
    every = lora.target_layers(unet, "unet", ALL_TARGETS)
    assert len(every) == 278  # all but conv_in, conv_out and the time embedding
    assert [keys.from_kohya(keys.to_kohya(name)) for name in every] == list(every)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 2, "text_encoder_rank": -1}, "rank must be at least 1, got -1"),
        ({"rank": 2, "alpha": 0.0}, "alpha must be a positive number"),
        ({"rank": 2, "alpha": float("nan")}, "alpha must be a positive number"),
        ({"rank": 2, "targets": ("atention",)}, "got atention"),
        ({"rank": 2, "targets": ()}, "got none"),
    ],
)
def test_impossible_settings_change_nothing(pipeline: Any, options: dict[str, Any], words: str) -> None:
    names = [name for name, _ in state(pipeline)]
    with pytest.raises(ConfigError, match=words):
        lora.inject(pipeline.unet, pipeline.text_encoder, **options)
    assert [name for name, _ in state(pipeline)] == names


def test_a_second_injection_is_refused(pipeline: Any) -> None:
    lora.inject(pipeline.unet, None, rank=2)
    with pytest.raises(AdapterError, match="carries adapters already"):
        lora.inject(pipeline.unet, None, rank=2)


def test_collect_needs_an_adapter(pipeline: Any) -> None:
    with pytest.raises(AdapterError, match="inject first"):
        lora.collect(pipeline.unet, pipeline.text_encoder, "sd1")


def test_collect_copies(pipeline: Any) -> None:
    parameters = lora.inject(pipeline.unet, None, rank=2)
    train(parameters)
    adapter = lora.collect(pipeline.unet, None, "sd1")
    kept = {name: weights.lora_B.clone() for name, weights in adapter.modules.items()}
    train(parameters, seed=6)
    assert all(torch.equal(adapter.modules[name].lora_B, b) for name, b in kept.items())


def test_adapters_off_is_the_base_bit_for_bit(pipeline: Any) -> None:
    base = predict(pipeline)
    parameters = lora.inject(pipeline.unet, pipeline.text_encoder, rank=2)
    train(parameters)
    trained = predict(pipeline)
    assert not torch.allclose(trained, base)
    with lora.adapters_off(pipeline.unet, pipeline.text_encoder):
        assert torch.equal(predict(pipeline), base)
        with lora.adapters_off(pipeline.unet, None):
            pass
        assert torch.equal(predict(pipeline), base)  # the inner block did not turn them on
    assert torch.equal(predict(pipeline), trained)
    with pytest.raises(KeyboardInterrupt), lora.adapters_off(pipeline.unet, pipeline.text_encoder):
        raise KeyboardInterrupt
    assert torch.equal(predict(pipeline), trained)
    # PEFT's own switch would set this anew for every factor
    assert all(p.requires_grad for p in [*parameters.unet, *parameters.text_encoder])


def test_adapters_off_between_forward_and_backward(pipeline: Any) -> None:
    """The teacher of the prior runs so: its pass must not cut the student's gradients."""
    parameters = lora.inject(pipeline.unet, None, rank=2)
    train(parameters)
    inputs = torch.randn(1, pipeline.unet.config.in_channels, 8, 8)
    text = torch.randn(1, 12, pipeline.unet.config.cross_attention_dim)
    student = pipeline.unet(inputs, 5, encoder_hidden_states=text).sample
    with torch.no_grad(), lora.adapters_off(pipeline.unet):
        teacher = pipeline.unet(inputs, 5, encoder_hidden_states=text).sample
    (student - teacher).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters.unet)


def test_remove_restores_the_very_tensors(pipeline: Any) -> None:
    before = {name: tensor.data_ptr() for name, tensor in state(pipeline)}
    lora.inject(pipeline.unet, pipeline.text_encoder, rank=2, targets=ALL_TARGETS)
    lora.remove(pipeline.unet, pipeline.text_encoder, None)
    assert {name: tensor.data_ptr() for name, tensor in state(pipeline)} == before
    assert not hasattr(pipeline.unet, "peft_config")
    lora.inject(pipeline.unet, pipeline.text_encoder, rank=3)  # as if nothing had been


def test_apply_is_the_trained_model(pipeline: Any) -> None:
    base = predict(pipeline)
    train(lora.inject(pipeline.unet, pipeline.text_encoder, rank=4, alpha=10, targets=ALL_TARGETS))
    trained = predict(pipeline)
    adapter = lora.collect(pipeline.unet, pipeline.text_encoder, "sd1")
    lora.remove(pipeline.unet, pipeline.text_encoder)
    lora.apply(pipeline, {adapter: 1.0})
    assert (trained - base).abs().max() > 20 * 1e-4
    torch.testing.assert_close(predict(pipeline), trained, atol=1e-4, rtol=1e-4)


def test_several_at_once_are_their_weighted_sum(load: Callable[[], Any], tmp_path: Path) -> None:
    pipeline, merged = load(), load()
    base = predict(pipeline)
    one = trained_adapter(pipeline, seed=1, rank=4, alpha=2.0, targets=("attention",))
    two = trained_adapter(pipeline, seed=2, rank=7, alpha=9.0, targets=ALL_TARGETS)
    file = tmp_path / "two.safetensors"
    write_adapter(file, two, dtype=torch.float32)
    lora.apply(pipeline, {one: 0.4, file: 0.8})
    lora.merge_into(merged, one, 0.4)
    lora.merge_into(merged, file, 0.8)
    together = predict(pipeline)
    assert (together - base).abs().max() > 20 * 1e-4
    torch.testing.assert_close(together, predict(merged), atol=1e-4, rtol=1e-4)


def test_apply_replaces_and_restores_bit_for_bit(pipeline: Any) -> None:
    base, before = predict(pipeline), {name: tensor.data_ptr() for name, tensor in state(pipeline)}
    one = trained_adapter(pipeline, seed=1)
    two = trained_adapter(pipeline, seed=2, rank=3)
    lora.apply(pipeline, {one: 1.0})
    with_one = predict(pipeline)
    lora.apply(pipeline, {two: 0.5})
    lora.apply(pipeline, {one: 1.0})
    assert torch.equal(predict(pipeline), with_one)
    with lora.adapters_off(pipeline.unet, pipeline.text_encoder):
        assert torch.equal(predict(pipeline), base)
    assert not any(p.requires_grad for p in pipeline.unet.parameters())  # applied, not trained
    lora.apply(pipeline, {})
    assert torch.equal(predict(pipeline), base)
    assert {name: tensor.data_ptr() for name, tensor in state(pipeline)} == before


def test_a_misfit_leaves_the_pipeline_as_it_was(pipeline: Any) -> None:
    good = trained_adapter(pipeline)
    lora.apply(pipeline, {good: 1.0})
    before = predict(pipeline)
    name, weights = next(iter(good.modules.items()))
    wide = LoraWeights(torch.ones(4, 999), weights.lora_B, 4.0)
    for modules, words in (
        ({name: wide}, r"does not fit this base: at .* changes weights of shape \(.*999\)"),
        (
            {"unet.down_blocks.9.attentions.0.proj_in": weights},
            r"1 of its 1 layers are missing there, e\.g\.",
        ),
    ):
        with pytest.raises(AdapterError, match=words):
            lora.apply(pipeline, {Adapter("sd1", modules): 1.0})
        assert torch.equal(predict(pipeline), before)
    with pytest.raises(AdapterError, match="finite number"):
        lora.apply(pipeline, {good: float("inf")})


def test_adapters_of_others_are_not_touched(pipeline: Any, tmp_path: Path) -> None:
    adapter = trained_adapter(pipeline)
    write_adapter(tmp_path / "a.safetensors", adapter)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    before = predict(pipeline)
    for act in (lambda: lora.apply(pipeline, {adapter: 1.0}), lambda: lora.merge_into(pipeline, adapter)):
        with pytest.raises(AdapterError, match="unload_lora_weights"):
            act()
    assert torch.equal(predict(pipeline), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_rounds_once(pipeline: Any, dtype: torch.dtype) -> None:
    adapter = trained_adapter(pipeline, alpha=6.0)
    pipeline.unet.to(dtype)
    pipeline.text_encoder.to(dtype)
    layers = adaptable_layers(pipeline.unet, "unet")
    before = {name: layer.get_parameter("weight").clone() for name, layer in layers.items()}
    lora.merge_into(pipeline, adapter, 0.5)
    for name, weight in before.items():
        expected = weight
        if name in adapter.modules:
            a, b = adapter.modules[name].lora_A, adapter.modules[name].lora_B
            expected = (weight.float() + 0.5 * 6.0 / 4 * (b @ a)).to(dtype)
        torch.testing.assert_close(layers[name].get_parameter("weight"), expected, atol=1e-6, rtol=1e-2)


def test_delta_of_a_convolution() -> None:
    """The two factors run one after the other are the convolution with dW."""
    layer = nn.Conv2d(5, 6, 3, padding=1, bias=False)
    weights = LoraWeights(torch.randn(2, 5, 3, 3), torch.randn(6, 2, 1, 1), alpha=3.0)
    inputs = torch.randn(1, 5, 7, 7)
    inner = torch.nn.functional.conv2d(inputs, weights.lora_A, padding=1)
    expected = torch.nn.functional.conv2d(inner, weights.lora_B) * 1.5
    got = torch.nn.functional.conv2d(inputs, delta(weights, layer), padding=1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_linear_adapter_fits_a_1x1_convolution_and_back() -> None:
    linear, conv = nn.Linear(5, 6), nn.Conv2d(5, 6, 1)
    a, b = torch.randn(2, 5), torch.randn(6, 2)
    flat = LoraWeights(a, b, 2.0)
    spatial = LoraWeights(a[:, :, None, None], b[:, :, None, None], 2.0)
    for weights in (flat, spatial):
        torch.testing.assert_close(delta(weights, linear), b @ a)
        torch.testing.assert_close(delta(weights, conv), (b @ a)[:, :, None, None])
    with pytest.raises(AdapterError, match="changes weights of shape"):
        delta(flat, nn.Conv2d(5, 6, 3))


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 5), (6, 3)), ((2, 5, 3, 3), (6, 2)), ((5,), (6,)), ((0, 5), (6, 0)), ((2, 5, 3, 3), (6, 2, 3, 3))],
)
def test_shapes_that_are_no_lora(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError):
        LoraWeights(torch.zeros(a), torch.zeros(b), 1.0)


class PrefixedTextEncoder(nn.Module):
    """CLIPTextModel as transformers 4 names its parts: all under `text_model.`."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = text_encoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.text_model(*args, **kwargs)


def test_both_namings_of_the_text_encoder(load: Callable[[], Any]) -> None:
    plain = load()
    adapter = trained_adapter(plain)
    lora.apply(plain, {adapter: 1.0})
    other = load()
    text_encoder = other.text_encoder
    if not hasattr(text_encoder, "text_model"):
        text_encoder = PrefixedTextEncoder(text_encoder)
    pipeline = SimpleNamespace(unet=other.unet, text_encoder=text_encoder)
    assert trained_adapter(pipeline).modules.keys() == adapter.modules.keys()
    lora.apply(pipeline, {adapter: 1.0})
    torch.testing.assert_close(predict(pipeline), predict(plain))


def test_check_fits_by_family(pipeline: Any) -> None:
    adapter = trained_adapter(pipeline)
    adapter.family = "toybox"
    check_fits(adapter, pipeline.unet, pipeline.text_encoder, base_family="sd1")  # a small SD1: shapes decide
    with pytest.raises(AdapterError, match="for a base of family toybox, this base is sdxl"):
        check_fits(adapter, pipeline.unet, pipeline.text_encoder, base_family="sdxl")
    with pytest.raises(AdapterError, match="layers are missing"):
        check_fits(adapter, pipeline.unet, None)


def test_apply_and_export_decide_alike(pipeline: Any) -> None:
    adapter = trained_adapter(pipeline)
    adapter.family = "sdxl"
    for use in (lambda: lora.apply(pipeline, {adapter: 1.0}), lambda: lora.merge_into(pipeline, adapter)):
        with pytest.raises(AdapterError, match="for a base of family sdxl, this base is sd1"):
            use()
    adapter.family = "toybox"
    adapter.metadata["modelspec.prediction_type"] = "v"
    with pytest.raises(AdapterError, match=r"predicts v_prediction, .*--prediction-type v_prediction"):
        lora.apply(pipeline, {adapter: 1.0})
    adapter.metadata["modelspec.prediction_type"] = "epsilon"
    lora.apply(pipeline, {adapter: 1.0})


def test_a_pipeline_without_torch_models_is_refused(pipeline: Any) -> None:
    adapter = trained_adapter(pipeline)
    with pytest.raises(AdapterError, match="no UNet of torch"):
        lora.apply(SimpleNamespace(unet=object()), {adapter: 1.0})
