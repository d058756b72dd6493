"""Many requests at once, beside transformers' `generate` and its continuous batching."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from checkpoint import IMAGE_TOKEN
from gpu_sections.measure import Row, Section, synchronize
from gpu_sections.model import check, image_prompts, prompt
from gpu_sections.run import Run, reason
from mm_engine import SamplingParams

GENERATE_TARGET, CONTINUOUS_TARGET = 4.0, 1.5
POLL = 1.0  # seconds
NUM_WARM_UP = 2  # tokens of each answer


@dataclass(frozen=True, slots=True)
class Asked:
    """All requests: an image and a text each, and how many tokens are wanted of each answer."""

    texts: list[int]
    outputs: list[int]

    @classmethod
    def of(cls, run: Run) -> Asked:
        """Lengths drawn evenly between the scale's bounds: no batch ends at once."""
        rng, scale = np.random.default_rng(0), run.scale
        texts, outputs = (
            rng.integers(low, high + 1, scale.num_requests).tolist()
            for low, high in (scale.texts, scale.outputs)
        )
        return cls(texts, outputs)

    def shortened(self) -> Asked:
        """To warm up."""
        return Asked(self.texts, [min(NUM_WARM_UP, num) for num in self.outputs])

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(self.outputs)


def throughput(run: Run, out: Section) -> None:
    """Tokens per second of all requests at once, images mapped and encoded on the way.

    Both run the same weights: transformers' model is made on the device, and the engine copies its
    weights. `generate` takes the prompts padded on the left, in batches as large as memory lets
    them be; a batch goes on until its longest answer is there, and only tokens that were asked for
    count. The text-only part has the same requests with text in the images' places, through
    `LlamaForCausalLM` on the same weights; the time that continuous batching takes to capture its
    graphs isn't counted, nor is the engine's startup.
    """
    asked = Asked.of(run)
    theirs = peer(run)
    report = run.runner.model.load_weights(theirs.state_dict().items())
    if report.missing:
        raise RuntimeError(f"weights were not copied: {report.missing[0]} is missing")
    out.details |= {"texts": asked.texts, "outputs": asked.outputs, "tokens": asked.num_tokens}

    failures: list[str] = []
    _ours(run, asked.shortened(), seed=100)
    ours, firsts = _ours(run, asked, seed=101)
    out.details["images, ours"] = ours
    seconds = None
    try:
        batch = largest_batch(run, theirs, asked)
        seconds, their_firsts = _generate(run, theirs, asked, batch, seed=101)
        same = sum(a == b for a, b in zip(firsts, their_firsts, strict=True))
        # How many begin alike: random weights in bfloat16 leave the likeliest tokens close.
        out.details |= {"images, generate": seconds, "batch of generate": batch, "same_first": same}
    except Exception as error:  # theirs; the text-only part goes on
        failures.append(f"generate: {reason(error)}")
    name = f"{run.scale.num_requests} image requests (transformers' generate)"
    _beside(out, name, asked.num_tokens, ours, seconds, GENERATE_TARGET)

    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # its cache takes a share of what is free
    _text(run, asked.shortened())
    ours = _text(run, asked)
    out.details["text, ours"] = ours
    seconds = None
    try:
        seconds = _continuous(run, theirs, asked)
        out.details["text, continuous batching"] = seconds
    except Exception as error:
        failures.append(f"continuous batching: {reason(error)}")
    name = f"{run.scale.num_requests} text requests (its continuous batching)"
    _beside(out, name, asked.num_tokens, ours, seconds, CONTINUOUS_TARGET)
    if failures:
        raise RuntimeError("; ".join(failures))


def _beside(
    out: Section, name: str, tokens: int, ours: float, theirs: float | None, target: float
) -> None:
    """Add a row; `theirs` is None if it failed."""
    rate = None if theirs is None else tokens / theirs
    ratio = None if theirs is None else theirs / ours
    out.rows.append(
        Row(
            name, tokens / ours, "tokens/s", rate, ratio, ratio_of="of transformers'", target=target
        )
    )


def peer(run: Run) -> Any:
    """transformers' model on the device, with weights drawn there."""
    config = transformers.LlavaConfig.from_pretrained(run.checkpoint)
    made = transformers.LlavaForConditionalGeneration
    with torch.device(run.device), no_init_weights():
        model = made._from_config(config, dtype=run.dtype, attn_implementation="sdpa")
    generator = torch.Generator(run.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1 and name.endswith("weight"):
                parameter.fill_(1.0)  # a norm's
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model.eval()


def _ours(run: Run, asked: Asked, seed: int) -> tuple[float, list[int]]:
    """Seconds for all image requests, and the first token of each answer."""
    return _engine(run, image_prompts(run, asked.texts, seed), asked)


def _text(run: Run, asked: Asked) -> float:
    """Seconds for all text requests."""
    return _engine(run, [{"prompt_token_ids": ids} for ids in _text_ids(run, asked)], asked)[0]


def _engine(run: Run, prompts: list[Any], asked: Asked) -> tuple[float, list[int]]:
    params = [
        SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True) for num in asked.outputs
    ]
    synchronize(run.device)
    start = time.perf_counter()
    outputs = run.llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    check(outputs)
    answers = [output.outputs[0].token_ids for output in outputs]
    if [len(answer) for answer in answers] != asked.outputs:
        raise RuntimeError("answers are not as long as asked for")
    return seconds, [answer[0] for answer in answers]


def _text_ids(run: Run, asked: Asked) -> list[list[int]]:
    return [prompt(i, run.scale.num_patches + num) for i, num in enumerate(asked.texts)]


def largest_batch(run: Run, model: Any, asked: Asked) -> int:
    """As many requests as `generate` can take at once: halved until memory suffices.

    Tried with the longest answers: a batch that begins well may not end so.
    """
    batch = len(asked.texts)
    while True:
        try:
            _generate(run, model, asked, batch, seed=102, num_batches=1)
            return batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch = -(-batch // 2)
        torch.cuda.empty_cache()


def _generate(
    run: Run, model: Any, asked: Asked, batch: int, seed: int, num_batches: int | None = None
) -> tuple[float, list[int]]:
    """Seconds of `generate` for all image requests, and the first token of each answer."""
    processor = AutoImageProcessor.from_pretrained(run.checkpoint)
    prompts = image_prompts(run, asked.texts, seed)
    firsts: list[int] = []
    synchronize(run.device)
    start = time.perf_counter()
    for begin in range(0, len(prompts), batch)[:num_batches]:
        part = prompts[begin : begin + batch]
        ids, mask = left_padded(
            [expanded(one["prompt_token_ids"], run.scale.num_patches) for one in part]
        )
        images = [one["multi_modal_data"]["image"] for one in part]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            answers = model.generate(
                input_ids=ids.to(run.device),
                attention_mask=mask.to(run.device),
                pixel_values=pixels.to(run.device, run.dtype),
                max_new_tokens=max(asked.outputs[begin : begin + batch]),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        if answers.shape[1] != ids.shape[1] + max(asked.outputs[begin : begin + batch]):
            raise RuntimeError("generate ended before its longest answer was there")
        firsts += answers[:, ids.shape[1]].tolist()
    synchronize(run.device)
    return time.perf_counter() - start, firsts


def expanded(ids: Sequence[int], num_patches: int) -> list[int]:
    """A prompt with as many image tokens as the image takes."""
    return [t for i in ids for t in ([i] * num_patches if i == IMAGE_TOKEN else [i])]


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[N, longest]`, padded with 0 on the left, and the mask of those that count."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    return ids, mask


def _continuous(run: Run, model: Any, asked: Asked) -> float:
    """Seconds of transformers' continuous batching for all text requests."""
    language = model.model.language_model
    with torch.device("meta"), no_init_weights():
        text = transformers.LlamaForCausalLM(language.config)
    text.model, text.lm_head = language, model.lm_head
    text.eval()
    before = language.config._attn_implementation
    config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(asked.outputs)
    )
    # No prompt is found again: the engine's prefix cache is off, too.
    own: dict[str, Any] = {"allow_block_sharing": False}
    if run.device.type != "cuda":
        own |= {"num_blocks": 16, "max_batch_tokens": 256}
    batching = ContinuousBatchingConfig(**own)
    seconds = 0.0
    try:
        with text.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, timeout=5, warmup=True
        ) as manager:
            for turn in (asked.shortened(), asked):
                synchronize(run.device)
                start = time.perf_counter()
                for ids, num in zip(_text_ids(run, turn), turn.outputs, strict=True):
                    manager.add_request(ids, max_new_tokens=num, eos_token_id=-1)
                num_tokens = num_ended = 0
                while num_ended < len(turn.outputs):
                    result = manager.get_result(timeout=POLL)
                    if result is None:
                        if not manager.is_running():
                            raise RuntimeError("continuous batching ended by itself")
                        continue
                    if result.is_finished():
                        if result.error is not None:
                            raise RuntimeError(f"continuous batching failed: {result.error}")
                        num_ended += 1
                        num_tokens += len(result.generated_tokens)
                seconds = time.perf_counter() - start
                if num_tokens != turn.num_tokens:
                    raise RuntimeError(f"{num_tokens} tokens came, not {turn.num_tokens}")
    finally:
        text.set_attn_implementation(before)
    return seconds
