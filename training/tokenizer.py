"""The tokenizer, the chat template and the processor, in the files that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from batches import MEAN, SIDE, STD
from pictures import CAPTION_QUESTIONS, questions, random_scene, training_rng
from tower import PATCH

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
VOCABULARY = 512
NUM_SCENES = 3000
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the human's questions.",
    "Answer briefly.",
)
"""System messages that a part of the training prompts start with."""

CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content if part['type'] == 'text' -%}
            {{- part['text'] -}}{{- '\\n' if not loop.last -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- '<s>' -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- text_of(message['content']) + ' ' -}}
    {%- elif message['role'] == 'user' -%}
        {{- 'USER: ' -}}
        {%- if message['content'] is not string -%}
            {%- for part in message['content'] if part['type'] in ['image', 'image_url'] -%}
                {{- '<image>\\n' -}}
            {%- endfor -%}
        {%- endif -%}
        {{- text_of(message['content']) -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ASSISTANT: ' + text_of(message['content']) + '</s>' -}}
    {%- else -%}
        {{- raise_exception('unknown role: ' + message['role'] + '. Use system, user or assistant.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ' ASSISTANT:' -}}
{%- endif -%}
"""  # noqa: E501
"""A message's images come before its text, as in LLaVA-1.5: ``<s>USER: <image>\\n...``."""


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on questions and answers of training seeds.

    Any text survives encoding and decoding. Encoding puts ``<s>`` first, as Llama's does.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # An answer follows `ASSISTANT:` with a space, which belongs to neither: `red`, not ` red`.
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Strip(content=" ", left=1, right=0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A $B",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        extra_special_tokens={"image_token": IMAGE},
    )


def _corpus() -> Iterator[str]:
    yield from SYSTEM_PROMPTS * 30
    yield from CAPTION_QUESTIONS * 200
    for seed in range(NUM_SCENES):
        rng = training_rng(seed)
        for question, answer, _ in questions(random_scene(rng), rng, varied=0.3):
            yield f"USER: \n{question} ASSISTANT: {answer}"


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor that joins the tokenizer with CLIP's image steps at our size."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
