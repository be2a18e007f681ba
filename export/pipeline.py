"""An exported folder as a diffusers pipeline, and with subjects that are swapped while it stays loaded."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from dbadapter.errors import BaseError, UsageError
from dbadapter.export.adapters import fitted_factors, mixed, read_onnx_adapter
from dbadapter.export.modules import OnnxModule, OnnxTextEncoder, OnnxUNet, OnnxVae
from dbadapter.export.runtime import Runner, open_session, pick_providers

__all__ = ["REPORT_NAME", "OnnxPipeline", "load_onnx_pipeline", "runners_of"]

REPORT_NAME = "export_report.json"
_VAE = ("vae_decoder", "vae_encoder")
# What each graph must take and give, for a folder whose files were mixed up.
_ENDS = {
    "text_encoder": ({"input_ids"}, {"last_hidden_state"}),
    "text_encoder_2": ({"input_ids"}, {"text_embeds"}),
    "unet": ({"sample", "timestep", "encoder_hidden_states"}, {"out_sample"}),
    "vae_decoder": ({"latent_sample"}, {"sample"}),
    "vae_encoder": ({"sample"}, {"latent_parameters"}),
}


def load_onnx_pipeline(
    folder: str | Path,
    providers: Sequence[str] | None = None,
    *,
    models: Mapping[str, Path] | None = None,
) -> Any:
    """Return a diffusers pipeline whose models run in ONNX Runtime: StableDiffusion's, or SDXL's.

    It is called like any other: `pipeline("a photo of sks dog").images`. Latents and sampler stay float32
    whatever the graphs' precision, so a seed starts from the same noise as in torch. Other diffusers
    pipelines take its parts: `StableDiffusionImg2ImgPipeline(**pipeline.components)`.

    Args:
        folder: as `export_onnx` writes it.
        providers: ONNX Runtime's execution providers, the wished one first; None means CUDA where it is, else
            the CPU.
        models: component -> another file in place of the folder's.
    Raises:
        BaseError: the folder is no ONNX export, or a part of it is missing or broken.
        UsageError: a provider that this installation of ONNX Runtime has not; or the folder is for GPUs, and
            there is none here.
    """
    import diffusers

    folder = Path(folder)
    index = _check_folder(folder)
    names = pick_providers(providers)
    if names[0] == "CPUExecutionProvider" and not models and _of_report(folder, "target") == "cuda":
        raise UsageError(
            f"{folder} was exported with --target cuda, which needs a GPU and none is there: use it where "
            "one is, or export with --target portable"
        )
    runners = {
        name: _runner((models or {}).get(name, folder / name / "model.onnx"), name, names)
        for name in components_of(index)
    }
    xl = "text_encoder_2" in runners
    try:
        parts = _models(folder, runners)
        parts["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
        if xl:
            zeros = bool(index.get("force_zeros_for_empty_prompt", True))
            pipeline: Any = diffusers.StableDiffusionXLPipeline(
                **parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False
            )
        else:
            none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = diffusers.StableDiffusionPipeline(**parts, **none)
    except Exception as error:  # third-party loaders raise anything on a broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseError(f"{folder}: the ONNX export cannot be loaded ({reason}); export it again") from error
    pipeline.register_to_config(_name_or_path=str(folder))
    pipeline.family = str(_of_report(folder, "base", "family") or "")  # decides the guidance scale
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class OnnxPipeline:
    """One resident export and any number of subjects, swapped, scaled and mixed from call to call.

        pipe = OnnxPipeline("base-onnx")
        pipe.load_adapter("dog", "dog.safetensors")
        pipe.load_adapter("hat", "hat.safetensors")
        pipe("a photo of sks dog with a wxv hat", adapters={"dog": 0.8, "hat": 0.5}).images[0]

    Nothing of a subject stays when the next one comes: the graph holds the base alone, the subjects are its
    inputs. Mixing is exact, see `adapters.mixed`. Threads may share one: their calls come one after the
    other, each with its own adapters (those of `pipeline` itself do not wait).

    Args:
        folder: as `export_onnx(..., swappable=True)` writes it; a merged one takes no adapters.
        providers: as for `load_onnx_pipeline`.
    Raises:
        BaseError, UsageError: as `load_onnx_pipeline`.

    Attributes:
        pipeline: the diffusers pipeline; `components` are its parts, for its other kinds.
    """

    def __init__(self, folder: str | Path, providers: Sequence[str] | None = None) -> None:
        self.pipeline = load_onnx_pipeline(folder, providers)
        self._family = self.pipeline.family
        self._base = _of_report(Path(folder), "base", "name")
        self._runners = runners_of(self.pipeline)
        self._loaded: dict[str, dict[str, Tensor]] = {}
        self._active: dict[str, float] = {}
        self._lock = threading.RLock()  # adapters and the scheduler's state are the whole pipeline's

    @property
    def components(self) -> dict[str, Any]:
        """The parts, for another diffusers pipeline: `StableDiffusionImg2ImgPipeline(**pipe.components)`."""
        parts: dict[str, Any] = self.pipeline.components
        return parts

    @property
    def adapters(self) -> dict[str, float]:
        """The adapters that are on, with their weights."""
        return dict(self._active)

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Read an adapter and place it where the graphs run; it is not on yet.

        Args:
            name: to call it by; one of the same name is replaced.
            path: a .safetensors file, or a folder as `dbadapter convert --to onnx-adapter` writes it.
        Raises:
            AdapterError: it is broken, or does not fit the export; the message gives the reason.
        """
        adapter = read_onnx_adapter(path)
        shapes = {
            key: shape for runner in self._runners.values() for key, shape in runner.factor_shapes.items()
        }
        factors = fitted_factors(adapter, shapes, self._family, Path(path).name)
        trained_on = adapter.about.get("base")
        if trained_on and self._base and trained_on != self._base:
            warnings.warn(
                f"adapter {Path(path).name} was trained on {trained_on}, this export is of {self._base}: the "
                "likeness may suffer",
                UserWarning,
                stacklevel=2,
            )
        placed = {}
        for component, runner in self._runners.items():
            for key in runner.factor_shapes:
                if key in factors:
                    placed[key] = factors[key].to(self._runners[component].device)
        with self._lock:
            self._loaded[name] = placed
            if name in self._active:
                self.set_adapters(self._active)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, and take it off if it is on.

        Raises:
            UsageError: none is called so.
        """
        with self._lock:
            self._known([name])
            self.set_adapters({each: weight for each, weight in self._active.items() if each != name})
            del self._loaded[name]

    def set_adapters(self, adapters: Mapping[str, float]) -> None:
        """Turn these adapters on, each with its weight, and all others off.

        Args:
            adapters: name -> weight; 1.0 is the strength it was trained at. None at all is the base.
        Raises:
            UsageError: a name that was not loaded, or a weight that is no finite number.
        """
        if not isinstance(adapters, Mapping):
            raise UsageError(f"adapters must be name -> weight, such as {{'dog': 0.8}}, got {adapters!r}")
        weights = {name: _weight(name, weight) for name, weight in adapters.items()}
        with self._lock:
            self._known(weights)
            joined = mixed([(self._loaded[name], weight) for name, weight in weights.items()])
            for runner in self._runners.values():
                runner.set_factors({key: joined[key] for key in runner.factor_shapes if key in joined})
            self._active = weights

    def __call__(
        self,
        prompt: Any = None,
        *arguments: Any,
        adapters: Mapping[str, float] | None = None,
        **settings: Any,
    ) -> Any:
        """Return what the diffusers pipeline returns.

        Args:
            prompt, arguments, settings: the pipeline's own.
            adapters: for this call alone; None means those that `set_adapters` turned on.
        Raises:
            UsageError: as `set_adapters`.
        """
        with self._lock:
            if adapters is None:
                return self.pipeline(prompt, *arguments, **settings)
            with self._for_now(adapters):
                return self.pipeline(prompt, *arguments, **settings)

    @contextmanager
    def _for_now(self, adapters: Mapping[str, float]) -> Any:
        before = self._active
        self.set_adapters(adapters)
        try:
            yield
        finally:
            self.set_adapters(before)

    def _known(self, names: Any) -> None:
        unknown = [name for name in names if name not in self._loaded]
        if unknown:
            known = ", ".join(self._loaded) or "none"
            raise UsageError(
                f"no adapter {unknown[0]!r} is loaded (loaded: {known}); call load_adapter first"
            )


def _weight(name: str, weight: Any) -> float:
    try:
        value = float(weight)
    except (TypeError, ValueError):
        value = float("nan")
    if not abs(value) < float("inf"):
        raise UsageError(f"the weight of adapter {name} must be a finite number, got {weight!r}")
    return value


def _runner(path: Path, name: str, providers: Sequence[str]) -> Runner:
    """Return a component's session, refused if the file is another component's or none of ours."""
    runner = Runner(open_session(path, providers))
    inputs, outputs = _ENDS[name]
    if not (inputs <= runner.inputs.keys() and outputs <= runner.outputs.keys()):
        raise BaseError(
            f"{path} is no {name} of ours: it takes {', '.join(list(runner.inputs)[:4])} and gives "
            f"{', '.join(list(runner.outputs)[:4])}; export it again"
        )
    return runner


def runners_of(pipeline: Any) -> dict[str, Runner]:
    """Return the sessions of a pipeline that `load_onnx_pipeline` returned, by component."""
    found = {name: part.runner for name, part in pipeline.components.items() if isinstance(part, OnnxModule)}
    vae = pipeline.vae
    del found["vae"]
    return {**found, "vae_decoder": vae.runner, "vae_encoder": vae.encoder}


def components_of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the components that a folder's model_index.json names."""
    encoders = [name for name in ("text_encoder", "text_encoder_2") if index.get(name)]
    return (*(encoders or ["text_encoder"]), "unet", *_VAE)


def _check_folder(folder: Path) -> dict[str, Any]:
    """Return model_index.json of an ONNX folder, or raise BaseError that says what is wrong with it."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise BaseError(
            f"{folder} is no ONNX export: it has no model_index.json; pass what export --onnx wrote"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        missing = [n for n in components_of(index) if not (folder / n / "model.onnx").is_file()]
    except (OSError, ValueError, AttributeError) as error:
        raise BaseError(f"{path} cannot be read ({error}); export the model again") from error
    if missing:
        raise BaseError(
            f"{folder} is no whole ONNX export: {missing[0]}/model.onnx is missing; export it with "
            "dbadapter export --onnx --output-dir FOLDER"
        )
    try:
        if not isinstance(index["scheduler"][1], str):
            raise TypeError("scheduler names no class")
    except (KeyError, TypeError, IndexError) as error:
        raise BaseError(f"{path} cannot be read ({error}); export the model again") from error
    checked: dict[str, Any] = index
    return checked


def _of_report(folder: Path, *names: str) -> Any:
    """Return an entry of the export's report; None if it is lost: the models run without it."""
    try:
        found = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
        for name in names:
            found = found[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _models(folder: Path, runners: Mapping[str, Runner]) -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTokenizer

    parts: dict[str, Any] = {
        "vae": OnnxVae(runners["vae_decoder"], runners["vae_encoder"], _config(folder / "vae_decoder")),
        "unet": OnnxUNet(runners["unet"], _config(folder / "unet")),
    }
    for name in runners:
        if name.startswith("text_encoder"):
            tokenizer = name.replace("text_encoder", "tokenizer")
            parts[name] = OnnxTextEncoder(runners[name], CLIPTextConfig.from_pretrained(folder / name))
            parts[tokenizer] = CLIPTokenizer.from_pretrained(folder / tokenizer)
    return parts


def _config(folder: Path) -> Any:
    """Return config.json with its entries as attributes, as diffusers' own models have it."""
    from diffusers.configuration_utils import FrozenDict

    return FrozenDict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
