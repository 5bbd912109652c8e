"""How the next token is drawn: one request's settings, where their defaults come from, and the draw itself."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qvl.core.config import read_object

Preset = Literal["model", "report", "official"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one request. temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this part of the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or answer."""
    presence_penalty: float = 0.0
    """Subtracted from logits of tokens already in the answer."""
    frequency_penalty: float = 0.0
    """The same, once for each time the token is there."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), at most 100 either way."""
    max_tokens: int = 1024
    seed: int | None = None
    """The same seed draws the same random numbers whatever else is in the batch; in exact mode the answer is the same too, in fast mode as
    far as rounding lets it."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    num_logprobs: int = 0
    """Likeliest alternatives reported with each token."""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature >= 0, "0 or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or above"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 and finite"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("logit_bias", all(-100 <= b <= 100 for _, b in self.logit_bias), "pairs of a token and -100 to 100"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("num_logprobs", 0 <= self.num_logprobs <= 20, "between 0 and 20"),
            ("stop", all(self.stop), "strings that are not empty"),
        )
        for name, is_good, expected in checks:
            if not is_good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {expected}.")


def defaults(
    folder: Path | str,
    preset: Preset = "model",
    *,
    is_thinking: bool = False,
    is_large: bool = False,
    is_moe: bool = False,
) -> Sampling:
    """`model`: the folder's generation_config.json. `official`: the Qwen3-VL repository's evaluation settings for pictures.
    `report`: section 5.11's settings for text tasks, which depend on the size (`is_large`: 30B and above)."""
    if preset == "model":
        return from_generation_config(Path(folder))
    if preset == "official":
        if is_thinking:
            return Sampling(temperature=0.6, top_p=0.95, top_k=20, max_tokens=40960, seed=1234)
        return Sampling(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5, max_tokens=32768, seed=3407)
    if is_thinking:
        warm = Sampling(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5, max_tokens=32768)
        return replace(warm, temperature=0.6, presence_penalty=0.0) if is_moe else warm
    if is_large:
        return Sampling(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5, max_tokens=32768)
    return Sampling(temperature=1.0, top_p=1.0, top_k=40, presence_penalty=2.0, max_tokens=32768)


def from_generation_config(folder: Path) -> Sampling:
    """A folder without the file samples greedily: transformers' own default."""
    raw = read_generation_config(folder)
    if not raw.get("do_sample", False):
        return Sampling(temperature=0.0, repetition_penalty=_number(raw, "repetition_penalty", 1.0))
    return Sampling(
        temperature=_number(raw, "temperature", 1.0),
        top_p=_number(raw, "top_p", 1.0),
        # transformers keeps 50 tokens where the file is silent
        top_k=int(_number(raw, "top_k", 50)),
        min_p=_number(raw, "min_p", 0.0),
        repetition_penalty=_number(raw, "repetition_penalty", 1.0),
        presence_penalty=_number(raw, "presence_penalty", 0.0),
    )


def end_tokens(folder: Path, default: int | None) -> frozenset[int]:
    """Tokens that end an answer: generation_config.json's, else the model's eos."""
    eos = read_generation_config(folder).get("eos_token_id", default)
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])


def read_generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    return read_object(path)


def _number(raw: dict[str, Any], name: str, default: float) -> float:
    value = raw.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"generation_config.json has {name} = {value!r}, expected a number.")
    return float(value)


@dataclass(frozen=True)
class Draw:
    token: int
    logprob: float
    """Of the model's own distribution, before penalties and temperature."""
    top: tuple[tuple[int, float], ...]
    is_forced: bool = False
    """Put there by a rule (the end of a thought whose budget is used up) and not sampled: no policy is trained on it."""


@dataclass(frozen=True)
class Best:
    """The likeliest token and its logprob, found for all rows of a batch at once; no number where the logits are not finite."""

    token: int
    logprob: float


class Sampler:
    """One sequence's draws: its own generator, and the tokens its penalties know of."""

    def __init__(self, sampling: Sampling, prompt_T: Tensor, vocab_size: int) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed) if sampling.seed is not None else None
        self.is_in_prompt_V = torch.zeros(vocab_size, dtype=torch.bool)
        self.is_in_prompt_V[prompt_T] = True
        self.is_in_answer_V = torch.zeros(vocab_size, dtype=torch.bool)
        self.count_V = torch.zeros(vocab_size) if sampling.frequency_penalty else None
        bad = [token for token, _ in sampling.logit_bias if not 0 <= token < vocab_size]
        if bad:
            raise ValueError(f"logit_bias names token {bad[0]}; the model knows 0 to {vocab_size - 1}.")
        self.biased = torch.tensor([token for token, _ in sampling.logit_bias], dtype=torch.int64)
        self.bias = torch.tensor([bias for _, bias in sampling.logit_bias], dtype=torch.float32)
        s = sampling
        penalties = (s.repetition_penalty != 1.0, s.presence_penalty, s.frequency_penalty, s.logit_bias)
        self.takes_best = s.temperature == 0 and not s.num_logprobs and not any(penalties)

    def __call__(
        self,
        logits_V: Tensor,
        *,
        allowed: Tensor | None = None,
        forced: int | None = None,
        best: Best | None = None,
    ) -> Draw:
        """logits_V: the model's, any dtype, on the CPU. Raises ValueError when they are not finite.

        `allowed` is a grammar's mask; what it does not reach is forbidden. `forced` is taken whatever the model thinks of it. `best` is
        what is known of the logits already: greedy draws that ask for nothing else need no more.
        """
        if best is not None and self.takes_best and allowed is None and forced is None and math.isfinite(best.logprob):
            return Draw(best.token, best.logprob, ())
        logits_V = logits_V.float()
        if not bool(torch.isfinite(logits_V).all()):
            raise ValueError(
                "the model's logits are not finite; the weights or the arithmetic are broken for this input."
            )
        logprob_V = logits_V.log_softmax(dim=-1)
        if forced is not None:
            token = forced
        else:
            token = self._choose(_masked(self._penalised(logits_V), allowed))
        self.is_in_answer_V[token] = True
        if self.count_V is not None:
            self.count_V[token] += 1
        likeliest = logprob_V.topk(self.sampling.num_logprobs)
        top = tuple(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
        return Draw(token, float(logprob_V[token]), top, is_forced=forced is not None)

    def _penalised(self, logits_V: Tensor) -> Tensor:
        s = self.sampling
        if s.repetition_penalty != 1.0:
            scaled_V = torch.where(logits_V > 0, logits_V / s.repetition_penalty, logits_V * s.repetition_penalty)
            logits_V = torch.where(self.is_in_prompt_V | self.is_in_answer_V, scaled_V, logits_V)
        if s.presence_penalty:
            logits_V = logits_V - s.presence_penalty * self.is_in_answer_V
        if self.count_V is not None:
            logits_V = logits_V - s.frequency_penalty * self.count_V
        if s.logit_bias:
            logits_V = logits_V.index_add(0, self.biased, self.bias)
        return logits_V

    def _choose(self, logits_V: Tensor) -> int:
        s = self.sampling
        if s.temperature == 0:
            return int(logits_V.argmax())
        count = min(s.top_k or len(logits_V), len(logits_V))
        # From the largest down, and no temperature that fp32 calls 0: the likeliest token keeps its place where others underflow.
        kept = ((logits_V - logits_V.max()) / max(s.temperature, 1e-30)).topk(count)
        probability = kept.values.softmax(dim=-1)
        # Likeliest first. Nucleus: a token stays while those before it hold less than top_p; the first always stays.
        before = probability.cumsum(0) - probability
        is_kept = (before < s.top_p) & (probability >= s.min_p * probability[0]) & (probability > 0)
        total = (probability * is_kept).cumsum(0)
        at = torch.rand((), generator=self.generator) * total[-1]
        place = min(int(torch.searchsorted(total, at, right=True)), int(is_kept.sum()) - 1)
        return int(kept.indices[place])


def _masked(logits_V: Tensor, allowed: Tensor | None) -> Tensor:
    if allowed is None:
        return logits_V
    size = min(len(allowed), len(logits_V))
    if not bool(allowed[:size].any()):
        raise ValueError("the grammar allows no token here; the answer cannot go on.")
    masked_V = torch.full_like(logits_V, -torch.inf)
    masked_V[:size] = logits_V[:size].masked_fill(~allowed[:size], -torch.inf)
    return masked_V
