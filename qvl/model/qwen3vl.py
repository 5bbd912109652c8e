"""The whole network on one page: patches and tokens in, hidden states out, logits where asked. Read this first."""

import torch
from torch import Tensor, nn

from qvl.core.batch import Batch
from qvl.core.device import ask_for_large_pages
from qvl.model.attention import Layout, Packed
from qvl.model.config import ModelConfig
from qvl.model.decoder import Decoder, DeepStack, embed
from qvl.model.layers import PLAIN_BLOCKS, Blocks, Linear, PackedWeight, RunBlock, linear, run_plainly
from qvl.model.moe import Experts, RouterStats
from qvl.model.vision import Vision, VisualFeatures, sincos_table


class Qwen3VL(nn.Module):
    """Vision tower, decoder and head (report 2). Without a vision config it is the text-only Qwen3.

    Module names are the checkpoint's, less the leading `model.` (weights.py maps them).
    """

    packed_head: PackedWeight | None = None
    """The head in the CPU matmul's order, or rounded (engine.prepare)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        if config.vision is not None:
            self.visual = Vision(config.vision)
        self.language_model = Decoder(config.text)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    def forward(
        self,
        batch: Batch,
        *,
        layout: Layout | None = None,
        features: VisualFeatures | None = None,
        router_out: list[RouterStats] | None = None,
        blocks: Blocks = PLAIN_BLOCKS,
    ) -> Tensor:
        """Hidden states after the final norm, (T, D): hand the rows you need to `logits`.

        `layout` says where keys and values are; None packs the batch's sequences. `features` are visual tokens encoded earlier
        (an encoder cache); None encodes the batch's patches. `blocks` says how each block runs.
        """
        if features is None and batch.patch_PX is not None:
            features = self.encode(batch, run_block=blocks.vision)
        x_TD = self.token_states(
            batch,
            layout=layout or Packed(batch.lengths, is_causal=True),
            features=features,
            router_out=router_out,
            run_block=blocks.decoder,
        )
        return self.language_model.norm(x_TD)

    def token_states(
        self,
        batch: Batch,
        *,
        layout: Layout,
        features: VisualFeatures | None,
        router_out: list[RouterStats] | None = None,
        run_block: RunBlock = run_plainly,
    ) -> Tensor:
        """Hidden states before the final norm, (T, D): embedding and all layers, with `features` at the visual tokens."""
        x_TD = embed(self.language_model, batch.token_T, batch.visual_M, features.merged_MD if features else None)
        deepstack = None
        if features is not None and batch.visual_M is not None:
            deepstack = DeepStack(features.deepstack, batch.visual_M)
        return self.language_model(
            x_TD,
            position_3T=batch.position_3T,
            layout=layout,
            deepstack=deepstack,
            router_out=router_out,
            run_block=run_block,
        )

    def encode(
        self, batch: Batch, *, max_patches: int | None = None, run_block: RunBlock = run_plainly
    ) -> VisualFeatures:
        """The batch's images and frames through the vision tower and the mergers."""
        if self.config.vision is None:
            raise ValueError(
                "this checkpoint is text-only, but the batch holds images or video. Load a Qwen3-VL checkpoint."
            )
        assert batch.patch_PX is not None and batch.grid_I3 is not None
        return self.visual(
            batch.patch_PX, batch.grid_I3, batch.frame_lengths, max_patches=max_patches, run_block=run_block
        )

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V) for any rows of hidden states."""
        return linear(hidden_TD, self.head_weight, None, self.packed_head)

    @property
    def device(self) -> torch.device:
        return self.language_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.embed_tokens.weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the token table itself when the head is tied."""
        if self.config.tie_word_embeddings:
            return self.language_model.embed_tokens.weight
        return self.lm_head.weight


def new_model(
    config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Qwen3VL:
    """A freshly drawn model: normal with the config's initializer_range, ones for norms, zeros for biases."""
    model = empty_model(config, dtype=dtype, device=device)
    init_weights(model, seed=seed)
    return model


def empty_model(config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> Qwen3VL:
    """Allocated but not drawn; on the "meta" device not even allocated."""
    with torch.device("meta"):
        model = Qwen3VL(config).to(dtype)
    if str(device) == "meta":
        return model
    model.to_empty(device=device)
    ask_for_large_pages(model.parameters())
    return model


@torch.no_grad()
def init_weights(model: nn.Module, *, seed: int) -> None:
    """Draw every parameter in name order from one seed, in fp32 on the CPU, so that dtype and device do not change the draw."""
    generator = torch.Generator().manual_seed(seed)
    ranges = _init_ranges(model)
    for name, module in sorted(model.named_modules()):
        std = ranges["visual" if name.startswith("visual") else "text"]
        for local, parameter in module.named_parameters(recurse=False):
            if local == "bias":
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            elif isinstance(module, nn.Linear | nn.Embedding | Experts):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                raise AssertionError(f"no rule to initialise {name}.{local}")
    for module in model.modules():
        if isinstance(module, Vision) and module.config.pos_embed_init == "sincos":
            module.pos_embed.weight.copy_(sincos_table(module.config.grid_side, module.config.hidden_size))


def _init_ranges(model: nn.Module) -> dict[str, float]:
    assert isinstance(model, Qwen3VL)
    text = model.config.text.initializer_range
    return {"text": text, "visual": model.config.vision.initializer_range if model.config.vision else text}
