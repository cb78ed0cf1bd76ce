"""The frozen vision tower: pictures to patch features. Called by the encoder actors and by serving.

Features are a pure function of the picture, because every forward has the same batch shape: results of a matrix product
can change with its shape, and cached features must equal those computed later for a single picture.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Self, TypeAlias

import torch
from PIL.Image import Image
from PIL.Image import new as new_image
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedConfig, SiglipVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from minivlm.model.fast_tower import use_products
from minivlm.model.image_tokens import count_features, first_line, read_tower_config
from minivlm.model.loading import explain_loading

VisionModel: TypeAlias = CLIPVisionModel | SiglipVisionModel
ImageProcessor: TypeAlias = CLIPImageProcessorPil | SiglipImageProcessorPil

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREPROCESS_KEYS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
)
MAX_RESIZE_FACTOR = 4
"""Longest side of a resized picture before the crop, in sides of the tower's input."""

OTHER_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
"""Weights of a whole CLIP or SigLIP that its vision half has no use for."""


class VisionTower:
    """A stock CLIP or SigLIP vision model with its image processor, in evaluation mode and without gradients."""

    def __init__(
        self,
        model: VisionModel,
        image_processor: ImageProcessor,
        *,
        precision: str = "float32",
        feature_layer: int = -1,
        batch_size: int,
        device: str = "cpu",
    ) -> None:
        """Take the float32 `model` over. `batch_size` is the fixed shape of every forward.

        Args:
            feature_layer: counted from the last, as transformers counts `hidden_states`; later layers are dropped.

        Raises:
            ValueError: unknown precision, a layer that the tower has not, or a processor that crops to another size
                than the model's input.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"clip.encode_precision is `{precision}`: type float32 or bfloat16")
        layers = model.encoder.layers
        if not -len(layers) - 1 <= feature_layer <= -1:
            raise ValueError(f"clip.feature_layer is {feature_layer}: the tower has layers -{len(layers) + 1} to -1")
        _check_processor(image_processor, model.config.image_size)
        self.image_processor = image_processor
        self.batch_size = batch_size
        self.precision = precision
        self.device = torch.device(device)
        self.num_features = count_features(model.config)
        numerics: list[int | str] = [batch_size, precision, feature_layer]
        if precision == "bfloat16":
            numerics.append("products")  # features of an earlier release differ in the last digit
        self.fingerprint = _fingerprint(model, image_processor, numerics)
        model.encoder.layers = layers[: len(layers) + 1 + feature_layer]
        if isinstance(model, SiglipVisionModel):  # LLaVA reads a layer's own output, before norm and pooling
            model.post_layernorm, model.use_head = nn.Identity(), False
        self.model = model.to(device=self.device, dtype=PRECISIONS[precision]).eval().requires_grad_(False)
        self.hidden_size: int = model.config.hidden_size
        if precision == "bfloat16" and self.device.type == "cpu":
            use_products(self.model, self.num_features, batch_size)

    @classmethod
    def load(
        cls, path: str, *, precision: str = "float32", feature_layer: int = -1, batch_size: int, device: str = "cpu"
    ) -> Self:
        """Read a folder or hub id of a CLIP or SigLIP, whole or vision half.

        Raises:
            ValueError: no such tower, no preprocessor_config.json beside it, or weights that are not all there.
        """
        model, processor = load_vision_model(path)
        return cls(
            model, processor, precision=precision, feature_layer=feature_layer, batch_size=batch_size, device=device
        )

    def preprocess(self, images: Sequence[Image]) -> Tensor:
        """RGB pictures of any size -> pixel_values [N, 3, H, W] float32, resized, centre-cropped and normalised."""
        if not images:
            side = self.model.config.image_size
            return torch.zeros(0, 3, side, side)
        size = dict(self.image_processor.size or {})
        is_resized = self.image_processor.do_resize and {key for key, value in size.items() if value} == {
            "shortest_edge"
        }
        if is_resized:  # as the processor does, which would first copy the whole picture to an array and back
            images = [resize_shortest(image, size["shortest_edge"], self.image_processor.resample) for image in images]
        pixel_values: Tensor = self.image_processor(
            images=list(images), do_resize=self.image_processor.do_resize and not is_resized, return_tensors="pt"
        )["pixel_values"]
        return pixel_values

    def encode(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> image_features [N, P, D_vision] bfloat16 on the CPU, a class token first."""
        return self.encode_exact(pixel_values).bfloat16()

    @torch.no_grad()
    def encode_exact(self, pixel_values: Tensor) -> Tensor:
        """As `encode`, in float32 and not rounded to the stored type: what a stock LLaVA model computes."""
        features = torch.empty(len(pixel_values), self.num_features, self.hidden_size)
        for start in range(0, len(pixel_values), self.batch_size):
            chunk = pixel_values[start : start + self.batch_size]
            padded = chunk.new_zeros(self.batch_size, *chunk.shape[1:])
            padded[: len(chunk)] = chunk
            hidden_states = self.model(padded.to(self.device, PRECISIONS[self.precision])).last_hidden_state
            features[start : start + len(chunk)] = hidden_states[: len(chunk)].float().cpu()
        return features


def resize_shortest(image: Image, side: int, resample: int) -> Image:
    """A picture whose shorter side has `side` pixels, the other in proportion, rounded down."""
    width, height = image.size
    short = min(width, height)
    return image.resize((int(side * width / short), int(side * height / short)), resample=resample)


def _check_processor(image_processor: ImageProcessor, side: int) -> None:
    """Its pictures must be the tower's input, finite, and no larger on the way there: its settings come from a file."""
    resized = dict(image_processor.size or {})
    size = dict((image_processor.crop_size if image_processor.do_center_crop else resized) or {})
    given = (size.get("height"), size.get("width"))
    if given != (side, side):
        raise ValueError(f"the image processor gives {given} px, but the vision tower reads {side} x {side} px")
    if any(value is not None and not 1 <= value <= MAX_RESIZE_FACTOR * side for value in resized.values()):
        raise ValueError(
            f"the image processor resizes to {resized} px, but the vision tower reads {side} x {side} px: sides from 1 "
            f"to {MAX_RESIZE_FACTOR} times that are supported"
        )
    try:
        picture = image_processor(images=[new_image("RGB", (side + 1, side))], return_tensors="pt")["pixel_values"]
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"the image processor fails at a plain picture: {error!r}") from error
    if picture.shape != (1, 3, side, side) or not bool(picture.isfinite().all()):
        raise ValueError(
            f"the image processor makes {tuple(picture.shape)} of a plain picture, or numbers that are not finite: "
            "look at do_resize, image_mean and image_std in its settings"
        )


def load_vision_model(path: str) -> tuple[VisionModel, ImageProcessor]:
    """The float32 vision half of a folder or hub id, and its image processor; errors as `VisionTower.load`."""
    model_class, processor_class = vision_classes(read_tower_config(path))
    try:
        model, info = model_class.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        image_processor = processor_class.from_pretrained(path)
    except Exception as error:  # transformers raises anything at strange settings
        raise ValueError(
            f"No vision tower under `{path}` ({first_line(error)}). Type clip.path=FOLDER with "
            "config.json, model.safetensors and preprocessor_config.json, or leave it out to train one"
        ) from error
    problem = explain_loading(model, info, ignored=OTHER_HALF)
    if problem is not None:
        raise ValueError(f"The vision tower under `{path}` is not the one that its config.json describes: {problem}")
    return model, image_processor


def vision_classes(config: PreTrainedConfig) -> tuple[type[VisionModel], type[ImageProcessor]]:
    """Model and image processor (always PIL's) for the vision settings of a tower that we run."""
    if config.model_type == "siglip_vision_model":
        return SiglipVisionModel, SiglipImageProcessorPil
    return CLIPVisionModel, CLIPImageProcessorPil


def _fingerprint(model: VisionModel, image_processor: ImageProcessor, numerics: list[int | str]) -> str:
    """16 hex digits of all that determines a feature."""
    settings = image_processor.to_dict()
    digest = hashlib.sha256(json.dumps(numerics).encode())
    digest.update(
        json.dumps({key: settings.get(key) for key in PREPROCESS_KEYS}, sort_keys=True, default=dict).encode()
    )
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
