"""What a checkpoint's config.json says, as frozen types; both published spellings in, either out, no silent defaults."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qvl.core.config import read_object

RopeScheme = Literal["interleaved", "chunked", "absolute_time", "plain"]


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (arXiv 2309.00071), the official recipe from 256K to 1M tokens."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How a token's place becomes an angle (report 2, "Interleaved MRoPE").

    `interleaved` is Qwen3-VL's. `chunked` is Qwen2-VL's: the axes take one block of frequencies each. `absolute_time` is chunked with
    Qwen2.5-VL's time ids, `tokens_per_second` to a second. `plain` is text-only RoPE on the token index.
    """

    theta: float
    scheme: RopeScheme
    section: tuple[int, int, int]
    """Frequencies of the time, height and width axes; their sum is half the head width."""
    yarn: Yarn | None = None
    tokens_per_second: float = 2.0


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]
    router_aux_loss_coef: float = 0.001

    def is_moe_layer(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    initializer_range: float
    rope: RopeConfig
    moe: MoEConfig | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        if sum(self.rope.section) * 2 != self.head_dim:
            raise ValueError(
                f"mrope_section {list(self.rope.section)} sums to {sum(self.rope.section)}, but head_dim {self.head_dim} has "
                f"{self.head_dim // 2} frequencies. Make the sections sum to half of head_dim."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value heads evenly."
            )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    initializer_range: float
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    pos_embed_init: Literal["normal", "sincos"] = "normal"
    """How a new model draws its position table; `sincos` is needed when training from scratch (values never see rotary angles, so
    "where" reaches the answer only through this table: mean IoU .46 against .06 on one-object boxes)."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid_side(self) -> int:
        """Side of the square position table."""
        return round(self.num_position_embeddings**0.5)

    @property
    def patch_numbers(self) -> int:
        """X, the numbers in one raw patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_area(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2

    def __post_init__(self) -> None:
        if self.grid_side**2 != self.num_position_embeddings:
            raise ValueError(f"num_position_embeddings must be a square, got {self.num_position_embeddings}.")
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"vision width {self.hidden_size} over {self.num_heads} heads must give a head width divisible by 4."
            )
        bad = [i for i in self.deepstack_visual_indexes if not 0 <= i < self.depth]
        if bad:
            raise ValueError(f"deepstack_visual_indexes {bad} are outside the {self.depth} vision blocks.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole network. `vision` is None for a text-only Qwen3 checkpoint (the text twin)."""

    text: TextConfig
    vision: VisionConfig | None
    tie_word_embeddings: bool
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.vision is None:
            return
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"the merger gives width {self.vision.out_hidden_size} (vision_config.out_hidden_size), the text model has "
                f"{self.text.hidden_size}; they must be equal."
            )
        if len(self.vision.deepstack_visual_indexes) > self.text.num_hidden_layers:
            raise ValueError(
                f"{len(self.vision.deepstack_visual_indexes)} DeepStack levels need as many decoder layers, "
                f"but there are {self.text.num_hidden_layers}."
            )
        if self.image_token_id is None or self.video_token_id is None:
            raise ValueError("a model with a vision tower needs image_token_id and video_token_id in config.json.")

    @property
    def model_type(self) -> str:
        base = "qwen3" if self.vision is None else "qwen3_vl"
        return base if self.text.moe is None else base + "_moe"


MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe", "qwen3", "qwen3_moe")


def read_config(folder: Path | str) -> ModelConfig:
    """The config of a checkpoint folder. Raises ValueError in one sentence for anything it cannot vouch for."""
    path = Path(folder) / "config.json"
    return config_from_hf(read_object(path, "a checkpoint folder's config.json"), where=str(path))


def config_from_hf(raw: Any, where: str = "config.json") -> ModelConfig:
    """Both spellings: the hub's (rope_scaling, rope_theta, num_experts) and transformers 5's (rope_parameters, num_local_experts)."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where} holds a {type(raw).__name__}, expected a JSON object.")
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"{where} says model_type {model_type!r}; this package reads {', '.join(MODEL_TYPES)}.")
    if raw.get("quantization_config"):
        raise ValueError(f"{where} has a quantization_config; load the bf16 checkpoint, quantised ones are not read.")
    is_vl = model_type.startswith("qwen3_vl")
    text_raw = _Fields(_object(raw, "text_config", where) if is_vl else raw, f"{where} text_config" if is_vl else where)
    top = _Fields(raw, where)
    text = _text_config(text_raw, is_moe=model_type.endswith("moe"), is_vl=is_vl)
    # The top-level flag decides; the MoE text class defaults to true and would tie 30B-A3B's head by accident.
    tied = top.need("tie_word_embeddings", bool)
    if not is_vl:
        return ModelConfig(text=text, vision=None, tie_word_embeddings=tied)
    vision = _vision_config(_Fields(_object(raw, "vision_config", where), f"{where} vision_config"))
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return ModelConfig(
        text=text, vision=vision, tie_word_embeddings=tied, **{name: top.need(name, int) for name in ids}
    )


class _Fields:
    """Typed look-ups in one JSON object, so that every refusal names the file, the field and what was expected."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def need(self, name: str, kind: type, *other_names: str) -> Any:
        for key in (name, *other_names):
            if key in self.raw:
                return self._checked(key, self.raw[key], kind)
        raise ValueError(f"{self.where} lacks {name!r}; defaults differ between versions, so add it.")

    def get(self, name: str, kind: type, default: Any) -> Any:
        value = self.raw.get(name)
        return default if value is None else self._checked(name, value, kind)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a field whose value this network does not implement."""
        if name in self.raw and self.raw[name] not in allowed:
            raise ValueError(f"{self.where} has {name} = {self.raw[name]!r}; only {allowed[0]!r} is implemented.")

    def _checked(self, name: str, value: Any, kind: type) -> Any:
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.where} has {name} = {value!r}, expected {kind.__name__}.")
        if kind in (int, float) and not -(2**53) < value < 2**53:
            raise ValueError(f"{self.where} has {name} = {value!r}, which is out of range.")
        return float(value) if kind is float else value


def _object(raw: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    value = raw.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{where} lacks the object {name!r}.")
    return value


def _ints(fields: _Fields, name: str, default: list[int] | None = None) -> tuple[int, ...]:
    values = fields.need(name, list) if default is None else fields.get(name, list, default)
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{fields.where} has {name} = {values!r}, expected a list of whole numbers.")
    return tuple(values)


def _text_config(fields: _Fields, *, is_moe: bool, is_vl: bool) -> TextConfig:
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("use_sliding_window", False)
    fields.only("partial_rotary_factor", 1.0, None)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("num_key_value_heads", "head_dim", "max_position_embeddings")
    # transformers leaves head_dim out of a text-only MoE config, where it is hidden/heads; Qwen3-VL always states it.
    if not is_vl and "head_dim" not in fields.raw:
        width = fields.need("hidden_size", int) // fields.need("num_attention_heads", int)
        fields = _Fields(fields.raw | {"head_dim": width}, fields.where)
    head_dim = fields.need("head_dim", int)
    if is_moe and is_vl:
        # transformers renormalises the chosen experts whatever this says, and drops the field when it writes; the hub files say true.
        fields.only("norm_topk_prob", True)
    moe = None
    if is_moe:
        moe = MoEConfig(
            num_experts=fields.need("num_experts", int, "num_local_experts"),
            num_experts_per_tok=fields.need("num_experts_per_tok", int),
            intermediate_size=fields.need("moe_intermediate_size", int),
            norm_topk_prob=True if is_vl else fields.need("norm_topk_prob", bool),
            decoder_sparse_step=fields.need("decoder_sparse_step", int),
            mlp_only_layers=_ints(fields, "mlp_only_layers"),
            router_aux_loss_coef=fields.get("router_aux_loss_coef", float, 0.001),
        )
    return TextConfig(
        **{name: fields.need(name, int) for name in sizes},
        rms_norm_eps=fields.need("rms_norm_eps", float),
        initializer_range=fields.need("initializer_range", float),
        rope=_rope_config(fields, head_dim, is_vl=is_vl),
        moe=moe,
        bos_token_id=fields.get("bos_token_id", int, None),
        eos_token_id=fields.get("eos_token_id", int, None),
    )


def _rope_config(fields: _Fields, head_dim: int, *, is_vl: bool) -> RopeConfig:
    scaling = fields.raw.get("rope_parameters") or fields.raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"{fields.where} has rope_scaling = {scaling!r}, expected an object or null.")
    rope = _Fields(scaling, f"{fields.where} rope_scaling")
    theta = rope.get("rope_theta", float, None) or fields.need("rope_theta", float)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "yarn", "mrope"):
        raise ValueError(f"{rope.where} has rope_type {kind!r}; default and yarn are implemented.")
    yarn = None
    if kind == "yarn":
        rope.only("mscale", None)
        rope.only("mscale_all_dim", None)
        rope.only("truncate", True)
        yarn = Yarn(
            factor=rope.need("factor", float),
            original_max_position_embeddings=rope.need("original_max_position_embeddings", int),
            attention_factor=rope.get("attention_factor", float, None),
            beta_fast=rope.get("beta_fast", float, 32.0),
            beta_slow=rope.get("beta_slow", float, 1.0),
        )
    if not is_vl:
        return RopeConfig(theta=theta, scheme="plain", section=(head_dim // 2, 0, 0), yarn=yarn)
    section = _ints(rope, "mrope_section")
    if len(section) != 3 or min(section) < 0:
        raise ValueError(
            f"{rope.where} has mrope_section {list(section)}, expected three counts (time, height, width)."
        )
    scheme = scaling.get("qvl_scheme", "interleaved" if scaling.get("mrope_interleaved", True) else "chunked")
    if scheme not in ("interleaved", "chunked", "absolute_time", "plain"):
        raise ValueError(
            f"{rope.where} has qvl_scheme {scheme!r}; interleaved, chunked, absolute_time and plain exist."
        )
    per_second = rope.get("qvl_tokens_per_second", float, 2.0)
    return RopeConfig(theta=theta, scheme=scheme, section=section, yarn=yarn, tokens_per_second=per_second)


def _vision_config(fields: _Fields) -> VisionConfig:
    fields.only("hidden_act", "gelu_pytorch_tanh")
    names = ("depth", "hidden_size", "num_heads", "intermediate_size", "out_hidden_size", "num_position_embeddings")
    names += ("patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels")
    return VisionConfig(
        **{name: fields.need(name, int) for name in names},
        deepstack_visual_indexes=_ints(fields, "deepstack_visual_indexes"),
        initializer_range=fields.need("initializer_range", float),
        pos_embed_init=fields.get("pos_embed_init", str, "normal"),
    )


def config_to_hf(
    config: ModelConfig, *, layout: Literal["hub", "v5"] = "hub", dtype: str = "bfloat16"
) -> dict[str, Any]:
    """config.json as the hub files spell it, or as transformers 5 does. transformers reads both."""
    text = _text_to_hf(config.text, layout, is_vl=config.vision is not None)
    suffix = "Moe" if config.text.moe else ""
    if config.vision is None:
        return {
            "architectures": [f"Qwen3{suffix}ForCausalLM"],
            "model_type": config.model_type,
            **text,
            "dtype": dtype,
            "tie_word_embeddings": config.tie_word_embeddings,
        }
    vision = asdict(config.vision) | {"hidden_act": "gelu_pytorch_tanh"}
    vision["deepstack_visual_indexes"] = list(config.vision.deepstack_visual_indexes)
    vision["model_type"] = config.model_type if layout == "hub" else config.model_type + "_vision"
    if config.vision.pos_embed_init == "normal":
        del vision["pos_embed_init"]
    text |= {"model_type": config.model_type + "_text", "dtype": dtype}
    if config.tie_word_embeddings:
        text["tie_word_embeddings"] = True
    return {
        "architectures": [f"Qwen3VL{suffix}ForConditionalGeneration"],
        "model_type": config.model_type,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _text_to_hf(text: TextConfig, layout: str, *, is_vl: bool) -> dict[str, Any]:
    out: dict[str, Any] = {k: v for k, v in asdict(text).items() if k not in ("rope", "moe")}
    out |= {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "use_cache": True}
    scaling: dict[str, Any] = {"rope_type": "yarn" if text.rope.yarn else "default"}
    if is_vl:
        scaling |= {"mrope_section": list(text.rope.section), "mrope_interleaved": text.rope.scheme == "interleaved"}
        if text.rope.scheme in ("absolute_time", "plain"):
            scaling |= {"qvl_scheme": text.rope.scheme, "qvl_tokens_per_second": text.rope.tokens_per_second}
    if text.rope.yarn:
        scaling |= {k: v for k, v in asdict(text.rope.yarn).items() if v is not None}
    if layout == "v5":
        out["rope_parameters"] = scaling | {"rope_theta": text.rope.theta}
    else:
        out["rope_theta"] = text.rope.theta
        out["rope_scaling"] = scaling if is_vl or text.rope.yarn else None
    if text.moe:
        out |= {
            "num_local_experts" if layout == "v5" else "num_experts": text.moe.num_experts,
            "num_experts_per_tok": text.moe.num_experts_per_tok,
            "moe_intermediate_size": text.moe.intermediate_size,
            "norm_topk_prob": text.moe.norm_topk_prob,
            "decoder_sparse_step": text.moe.decoder_sparse_step,
            "mlp_only_layers": list(text.moe.mlp_only_layers),
            "router_aux_loss_coef": text.moe.router_aux_loss_coef,
        }
    return out


def preset(name: str) -> ModelConfig:
    """A published size ("2B", "4B", "8B", "32B", "30B-A3B", "235B-A22B") or a small one ("nano", "0.2B", "0.6B") for CPUs and tests."""
    if name not in _PRESETS:
        raise ValueError(f"there is no size {name!r}; choose one of {', '.join(_PRESETS)}.")
    return _PRESETS[name]


def _size(
    *,
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    tied: bool,
    vision: tuple[int, int, int, int],
    head_dim: int = 128,
    experts: tuple[int, int, int] | None = None,
) -> ModelConfig:
    """vision = (depth, width, MLP width, heads); experts = (count, chosen per token, MLP width)."""
    depth, width, vision_mlp, vision_heads = vision
    sixteenth = head_dim // 16 if head_dim < 128 else 0
    section = (
        (24, 20, 20) if head_dim == 128 else (head_dim // 2 - 5 * sixteenth, 5 * sixteenth // 2, 5 * sixteenth // 2)
    )
    if sum(section) * 2 != head_dim:
        raise ValueError(f"no default MRoPE section for head_dim {head_dim}.")
    return ModelConfig(
        text=TextConfig(
            vocab_size=151936,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=1e-6,
            max_position_embeddings=262144,
            initializer_range=0.02,
            rope=RopeConfig(theta=5_000_000.0, scheme="interleaved", section=section),
            moe=experts
            and MoEConfig(
                num_experts=experts[0],
                num_experts_per_tok=experts[1],
                intermediate_size=experts[2],
                norm_topk_prob=True,
                decoder_sparse_step=1,
                mlp_only_layers=(),
            ),
            bos_token_id=151643,
            eos_token_id=151645,
        ),
        vision=VisionConfig(
            depth=depth,
            hidden_size=width,
            num_heads=vision_heads,
            intermediate_size=vision_mlp,
            out_hidden_size=hidden,
            num_position_embeddings=2304,
            deepstack_visual_indexes=spread_levels(depth),
            initializer_range=0.02,
        ),
        tie_word_embeddings=tied,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


_LARGE, _SO400M = (24, 1024, 4096, 16), (27, 1152, 4304, 16)


def spread_levels(depth: int) -> tuple[int, int, int]:
    """The vision blocks whose output goes to the first three decoder layers.

    The report does not say which. The two published towers follow no common rule: 24 blocks take the ends of their first three quarters
    (5, 11, 17), 27 take 8, 16, 24. Any other depth takes the ends of its quarters too.
    """
    if depth < 3:
        raise ValueError(f"{depth} vision blocks cannot give three DeepStack levels; name the blocks (deepstack).")
    if depth == 27:
        return 8, 16, 24
    first, second, third = (-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3))
    return first, second, third


_PRESETS = {
    "2B": _size(hidden=2048, mlp=6144, layers=28, heads=16, kv_heads=8, tied=True, vision=_LARGE),
    "4B": _size(hidden=2560, mlp=9728, layers=36, heads=32, kv_heads=8, tied=True, vision=_LARGE),
    "8B": _size(hidden=4096, mlp=12288, layers=36, heads=32, kv_heads=8, tied=False, vision=_SO400M),
    "32B": _size(hidden=5120, mlp=25600, layers=64, heads=64, kv_heads=8, tied=False, vision=_SO400M),
    "30B-A3B": _size(
        hidden=2048, mlp=6144, layers=48, heads=32, kv_heads=4, tied=False, vision=_SO400M, experts=(128, 8, 768)
    ),
    "235B-A22B": _size(
        hidden=4096, mlp=12288, layers=94, heads=64, kv_heads=4, tied=False, vision=_SO400M, experts=(128, 8, 1536)
    ),
    # Small shapes of our own: one to try things on, two to measure on.
    "nano": _size(hidden=256, mlp=768, layers=4, heads=4, kv_heads=2, tied=True, vision=(4, 192, 512, 3), head_dim=64),
    "0.2B": _size(
        hidden=768, mlp=2304, layers=12, heads=12, kv_heads=4, tied=True, vision=(12, 768, 3072, 12), head_dim=64
    ),
    "0.6B": _size(hidden=1024, mlp=3072, layers=28, heads=16, kv_heads=8, tied=True, vision=_LARGE),
}
_PRESETS["nano-moe"] = replace(
    _PRESETS["nano"],
    text=replace(
        _PRESETS["nano"].text,
        moe=MoEConfig(
            num_experts=8,
            num_experts_per_tok=2,
            intermediate_size=192,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=(),
        ),
    ),
    tie_word_embeddings=False,
)
