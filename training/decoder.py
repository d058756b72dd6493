"""The decoder's stage: every question about a picture in one sequence, behind one image.

A row is the prompt up to and with the image, then one segment for each conversation about it. A
segment attends to the prefix and itself and its positions go on where the prefix ends, so each
segment is computed exactly as the chat prompt that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import trange
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from optim import Optimizers
from pictures import COLOURS, MIN_SEPARATION, SHAPES, QuestionAnswer, Scene, questions
from tokenizer import BOS, EOS, IMAGE, SYSTEM_PROMPTS

IGNORED = -100
LENGTH_STEP = 32
"""Lengths are padded to a multiple of this: oneDNN compiles its kernels anew for each shape."""
LOWEST = torch.finfo(torch.bfloat16).min
SYSTEM_SHARE = 0.15
"""Share of the batches whose prompts start with a system message."""
VARIED_SHARE = 0.25
"""Probability that a question is asked in another wording."""
TWO_TURNS_SHARE = 0.15
"""Share of the questions that are asked as the second turn after another."""
LOOKUP_LAYERS = 2
"""After how many of the decoder's layers the hints are read."""
MAX_SEGMENTS = 10
"""Most conversations about one picture in a batch; the caption is always among them."""


class DrawnBatch(Protocol):
    """What every kind of batch has: scenes, and a generator to ask questions with."""

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The scenes that the batch's pictures show."""

    @property
    def rng(self) -> np.random.Generator:
        """The generator that questions are asked with."""


DrawnT = TypeVar("DrawnT", bound=DrawnBatch)


@dataclass(frozen=True)
class Packed:
    """One batch of packed sequences; the image's are ids ``image_start`` up to ``image_end``."""

    input_ids: torch.Tensor
    """``[batch, length]`` int64."""
    positions: torch.Tensor
    """``[batch, length]`` int64."""
    mask: torch.Tensor
    """``[batch, 1, length, length]`` bfloat16, 0 where a query may look and very low elsewhere."""
    targets: torch.Tensor
    """``[batch, length]`` int64: the next token where it belongs to an answer, else IGNORED."""
    weights: torch.Tensor
    """``[batch, length]`` float32: a target's weight, less the longer its answer is."""
    hints: torch.Tensor
    """``[batch, length]`` int64: what a question's tokens can look up already.

    From the question's last shape or colour on, the answer's first token. In a question of place
    the tokens between the two shapes have the first one's place in the order asked about and the
    second shape its own, which leaves a comparison.
    """
    image_start: int
    image_end: int


@dataclass(frozen=True)
class Segment:
    """One conversation after its image; lists of one length, as the fields of ``Packed``."""

    ids: list[int]
    targets: list[int]
    weights: list[float]
    hints: list[int]

    def __add__(self, later: Segment) -> Segment:
        return Segment(
            self.ids + later.ids,
            self.targets + later.targets,
            self.weights + later.weights,
            self.hints + later.hints,
        )


class Packer:
    """Turns questions and answers into packed batches for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.pad: int = tokenizer.pad_token_id
        self.image: int = tokenizer.convert_tokens_to_ids(IMAGE)
        self.encode = lru_cache(maxsize=100_000)(self._encode)
        self.names = {self.encode(f" {name}")[0] for name in (*COLOURS, *SHAPES)}

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def segments(
        self, scene: Scene, asked: list[QuestionAnswer], rng: np.random.Generator
    ) -> Iterator[Segment]:
        """Yield the questions in random order, some as the second turn after another."""
        order = rng.permutation(len(asked))
        for place, index in enumerate(order):
            segment = self._turn("\n", asked[index], scene)
            if place and rng.random() < TWO_TURNS_SHARE:
                first = self._turn("\n", asked[order[place - 1]], scene)
                segment = first + self._turn("USER: ", asked[index], scene)
            yield segment

    def _turn(self, opening: str, asked: QuestionAnswer, scene: Scene) -> Segment:
        question, answer, kind = asked
        prompt = self.encode(f"{opening}{question} ASSISTANT:")
        reply = self.encode(f" {answer}{EOS}")
        hints = [IGNORED] * (len(prompt) + len(reply))
        named = [i for i, token in enumerate(prompt) if token in self.names]
        if named:
            hints[named[-1] : len(prompt)] = [reply[0]] * (len(prompt) - named[-1])
        if kind == "relation":
            first, last = named
            subject, other = self._ranks(question, scene)
            hints[first + 1 : last] = [subject] * (last - first - 1)
            hints[last : len(prompt)] = [other, *[IGNORED] * (len(prompt) - last - 1)]
        return Segment(
            ids=[*prompt, *reply],
            targets=[*[IGNORED] * (len(prompt) - 1), *reply, IGNORED],
            weights=[len(reply) ** -0.5] * (len(prompt) + len(reply)),
            hints=hints,
        )

    def _ranks(self, question: str, scene: Scene) -> tuple[int, int]:
        """Return the tokens of both objects' places in the order asked about, where clear.

        The order starts at the side asked about, so the answer is yes if the first is lower.
        """
        words = question.rstrip("?").split()
        axis = "x" if "of" in words else "y"
        backwards = "right" in words or "below" in words
        places = sorted((getattr(item, axis) for item in scene.objects), reverse=backwards)
        if min(np.abs(np.diff(places))) < 0.5 * MIN_SEPARATION:
            return IGNORED, IGNORED
        place_of = {item.shape: getattr(item, axis) for item in scene.objects}
        ranks = [places.index(place_of[word]) + 1 for word in words if word in SHAPES]
        subject, other = (self.encode(f" {rank}")[0] for rank in ranks)
        return subject, other

    def pack(
        self,
        scenes: Sequence[Scene],
        asked: Sequence[list[QuestionAnswer]],
        rng: np.random.Generator,
        image_tokens: int,
        system: str = "",
    ) -> Packed:
        """Return the questions, a list for each picture of ``image_tokens``, as one batch."""
        opening = self.encode(f"{BOS}{system + ' ' if system else ''}USER: ")
        prefix = [*opening, *[self.image] * image_tokens]
        rows = [list(self.segments(*row, rng)) for row in zip(scenes, asked, strict=True)]
        longest = len(prefix) + max(sum(len(segment.ids) for segment in row) for row in rows)
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        shape = (len(rows), length)
        input_ids = np.full(shape, self.pad, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        owner = np.full(shape, -1, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        weights = np.zeros(shape, dtype=np.float32)
        hints = np.full(shape, IGNORED, dtype=np.int64)
        input_ids[:, : len(prefix)] = prefix
        positions[:, : len(prefix)] = np.arange(len(prefix))
        owner[:, : len(prefix)] = 0
        for i, row in enumerate(rows):
            start = len(prefix)
            for number, segment in enumerate(row, start=1):
                end = start + len(segment.ids)
                input_ids[i, start:end] = segment.ids
                positions[i, start:end] = len(prefix) + np.arange(len(segment.ids))
                owner[i, start:end] = number
                targets[i, start:end] = segment.targets
                weights[i, start:end] = segment.weights
                hints[i, start:end] = segment.hints
                start = end
        owners = torch.from_numpy(owner)
        visible = (owners[:, None, :] == 0) | (owners[:, None, :] == owners[:, :, None])
        visible &= torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill_(~visible, LOWEST)
        return Packed(
            input_ids=torch.from_numpy(input_ids),
            positions=torch.from_numpy(positions),
            mask=mask[:, None],
            targets=torch.from_numpy(targets),
            weights=torch.from_numpy(weights),
            hints=torch.from_numpy(hints),
            image_start=len(opening),
            image_end=len(prefix),
        )

    def training_pack(self, batch: DrawnBatch, image_tokens: int) -> Packed:
        """Return all the questions about a batch of pictures in randomly varied wordings."""
        rng = batch.rng
        asked = []
        for scene in batch.scenes:
            *others, caption = questions(scene, rng, varied=VARIED_SHARE)
            kept = rng.permutation(len(others))[: MAX_SEGMENTS - 1]
            asked.append([*(others[i] for i in kept), caption])
        system = ""
        if rng.random() < SYSTEM_SHARE:
            system = SYSTEM_PROMPTS[int(rng.integers(len(SYSTEM_PROMPTS)))]
        return self.pack(batch.scenes, asked, rng, image_tokens, system)


def text_states(
    model: LlavaForConditionalGeneration | LlavaNextForConditionalGeneration,
    image: torch.Tensor,
    packed: Packed,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the decoder's last and middle states, ``[batch, texts, hidden]``, after the image.

    ``image`` is what stands for the image tokens, ``[batch, image_tokens, hidden]``.
    """
    inner = model.model
    embedded = inner.language_model.embed_tokens(packed.input_ids)
    start, end = packed.image_start, packed.image_end
    embedded = torch.cat([embedded[:, :start], image.to(embedded.dtype), embedded[:, end:]], dim=1)
    output = inner.language_model(
        inputs_embeds=embedded,
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    return output.last_hidden_state[:, end:], output.hidden_states[LOOKUP_LAYERS][:, end:]


def train_decoder(
    model: LlavaForConditionalGeneration | LlavaNextForConditionalGeneration,
    hint_head: nn.Linear,
    packer: Packer,
    *,
    draw_batch: Callable[[int, int], DrawnT],
    image_states: Callable[[DrawnT], torch.Tensor],
    num_steps: int,
    batch_size: int,
    rate: float,
    first_seed: int,
    on_report: Callable[[int], None],
) -> None:
    """Train projector and decoder in place; ``on_report`` is called with the step at each report.

    ``draw_batch`` takes a first seed and a size, and ``image_states`` gives a batch's image tokens
    ``[batch, image_tokens, hidden]`` by way of the projector. The tower stays as it is: trained
    along, it forgets its labels. ``hint_head`` asks the tokens of a question for what they can
    look up (see ``Packed.hints``), halfway through the layers so that the others can work with
    it. It is thrown away afterwards.
    """
    inner = model.model
    own = nn.ParameterList(inner.parameters(recurse=False))  # LLaVA-NeXT's newline
    optimizers = Optimizers(
        [inner.multi_modal_projector, inner.language_model],
        [model.lm_head, hint_head, own],
        rate=rate,
        num_steps=num_steps,
    )
    bar = trange(num_steps, desc="decoder", mininterval=5)
    for step in bar:
        batch = draw_batch(first_seed + step * batch_size, batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            image = image_states(batch)
            packed = packer.training_pack(batch, image.shape[1])
            last, middle = text_states(model, image, packed)
            logits = model.lm_head(last).float().flatten(0, 1)
            middle = functional.rms_norm(middle.float(), middle.shape[-1:])
            hinted = hint_head(middle).float().flatten(0, 1)
        after = packed.image_end
        targets, hints = packed.targets[:, after:].flatten(), packed.hints[:, after:].flatten()
        weights = packed.weights[:, after:].flatten() * (targets != IGNORED)
        losses = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        hint_loss = functional.cross_entropy(hinted, hints, ignore_index=IGNORED)
        (loss + 0.5 * hint_loss).backward()
        optimizers.step()
        if step % 50 == 49:
            right = (logits.argmax(-1) == targets)[targets != IGNORED].float().mean().item()
            bar.write(
                f"decoder step {step + 1}: loss {loss.item():.4f} hints {hint_loss.item():.4f}"
                f" tokens {right:.4f}"
            )
            on_report(step + 1)
