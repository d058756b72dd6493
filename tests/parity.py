"""The oracle: transformers on the same checkpoint, in float32, greedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mm_engine import LLM
from mm_engine.sequence import ScheduledBatch

#: Two float32 logits nearer than this are a tie: the order of additions decides.
TIE = 1e-4


@dataclass(frozen=True)
class Case:
    """A raw prompt and its images."""

    prompt: str
    images: tuple[Image.Image, ...] = ()

    def as_prompt(self) -> dict[str, Any]:
        """As `LLM.generate` takes it."""
        return {"prompt": self.prompt, "multi_modal_data": {"image": list(self.images)}}


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """Noise, so that no two pictures are alike."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


class Oracle:
    """transformers' answers, computed once for each case."""

    def __init__(self, checkpoint: Path) -> None:
        # Eager: "sdpa", which older versions choose for any model, has no soft caps and leaves
        # them out.
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.image_processor = AutoImageProcessor.from_pretrained(checkpoint)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def inputs(
        self, prompt_token_ids: Sequence[int], images: Sequence[Image.Image]
    ) -> dict[str, Any]:
        """Keywords of the model for one prompt."""
        ids = torch.tensor([list(prompt_token_ids)])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**inputs, **self.pixels(images)} if images else inputs

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """What transformers' image processor makes of `images`: `pixel_values`, `image_sizes`."""
        return dict(self.image_processor(list(images), return_tensors="pt"))

    def features(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """`[num_tokens, hidden]` of each image, by transformers' own tower and projector."""
        with torch.no_grad():
            encoded = self.model.model.get_image_features(**self.pixels(images), return_dict=True)
        return list(encoded.pooler_output)

    def expanded_ids(self, case: Case) -> list[int]:
        """The prompt's ids, each image's placeholder as often as transformers makes rows of it."""
        images = case.images
        return self.expanded(case, [len(r) for r in self.features(images)] if images else [])

    def expanded(self, case: Case, counts: Sequence[int]) -> list[int]:
        """The prompt's ids with its images' placeholders repeated as `counts` say."""
        left = iter(counts)
        expanded: list[int] = []
        for token in self.tokenizer(case.prompt)["input_ids"]:
            is_image = token == self.model.config.image_token_id
            expanded += [token] * (next(left) if is_image else 1)
        return expanded

    def answer(
        self, case: Case, num_tokens: int, prompt_token_ids: Sequence[int] | None = None
    ) -> list[int]:
        """Greedy ids, end of sequence ignored. The expanded prompt may be given, if it is known."""
        inputs = self.inputs(prompt_token_ids or self.expanded_ids(case), case.images)
        with torch.no_grad():
            ids = self.model.generate(
                **inputs, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
            )
        answer: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
        return answer

    def logits(self, case: Case, answer: Sequence[int]) -> torch.Tensor:
        """`[len(answer) + 1, vocab]`: what each token of `answer`, and the next, was taken from."""
        prompt = self.expanded_ids(case)
        with torch.no_grad():
            logits: torch.Tensor = self.model(
                **self.inputs([*prompt, *answer], case.images)
            ).logits[0]
        return logits[len(prompt) - 1 :]

    def check(self, case: Case, expected: Sequence[int], got: Sequence[int]) -> None:
        """Fail unless `got` is `expected`, up to the first real tie."""
        assert len(expected) == len(got)
        for position, (want, have) in enumerate(zip(expected, got, strict=True)):
            if want != have:
                logits = self.logits(case, got[:position])[-1]
                gap = float(logits.max() - logits[have])
                assert gap < TIE, f"token {position}: {have} instead of {want}, behind by {gap:.2e}"
                return


@dataclass
class Trace:
    """What the scheduler planned, step by step."""

    steps: list[ScheduledBatch] = field(default_factory=list)
    shares: list[list[tuple[int, int, int]]] = field(default_factory=list)
    cut_images: int = 0
    mixed_steps: int = 0
    most_sequences: int = 0
    slices: int = 0  # steps that encoded a piece of an image

    @classmethod
    def of(cls, llm: LLM) -> Trace:
        """Watch `llm`'s scheduler from now on."""
        trace, schedule = cls(), llm.engine.scheduler.schedule

        def watched(in_flight: ScheduledBatch | None) -> ScheduledBatch:
            batch = schedule(in_flight)
            trace.note(batch)
            return batch

        llm.engine.scheduler.schedule = watched  # type: ignore[method-assign]
        return trace

    def note(self, batch: ScheduledBatch) -> None:
        """Count what kind of step this is."""
        self.steps.append(batch)
        self.slices += batch.encode_slice is not None
        self.most_sequences = max(self.most_sequences, len(batch.sequences))
        decodes = sum(
            s.sequence.num_output_tokens > 0 and s.num_new_tokens == 1 for s in batch.sequences
        )
        prefills = sum(s.start < s.sequence.num_prompt_tokens for s in batch.sequences)
        self.mixed_steps += bool(decodes and prefills)
        for share in batch.sequences:
            for item in share.sequence.request.items:
                self.cut_images += item.placeholder.offset < share.end < item.placeholder.end
