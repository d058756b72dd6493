"""What training computes for a packed segment is what transformers computes for its prompt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


@pytest.mark.parametrize("first_seed", [500, 1200, 1300])
def test_a_packed_question_has_the_logits_of_its_chat_prompt(
    training: SimpleNamespace, first_seed: int
) -> None:
    start = training.train_llava_next_demo.START
    torch.manual_seed(0)
    model = training.tiled_model.tiled_model(start).eval()
    processor = training.tiled_model.tiled_processor(start)
    batch = training.views.tiled_batch(first_seed, 2)
    packer = training.decoder.Packer(processor.tokenizer)
    asked = [training.pictures.questions(scene, batch.rng) for scene in batch.scenes]
    with torch.no_grad():
        image = training.tiled_model.tiled_image_states(model, batch)
        packed = packer.pack(batch.scenes, asked, batch.rng, image.shape[1])
        packed.mask.data = packed.mask.float()
        states, _ = training.decoder.text_states(model, image, packed)
        logits = model.lm_head(states)[0]

    ids = packed.input_ids[0, packed.image_end :].tolist()
    segments, begin = [], 0
    while ids[begin] != packer.pad:
        end = ids.index(packer.tokenizer.eos_token_id, begin) + 1
        segments.append((begin, end))
        begin = end
        if begin == len(ids):
            break
    begin, end = segments[1]
    text = packer.tokenizer.decode(ids[begin:end])
    question = text.removeprefix("\n").split(" ASSISTANT:")[0]
    picture = training.pictures.draw(batch.scenes[0], *batch.size)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    prompt = inputs["input_ids"][0, packed.image_end :].tolist()
    assert prompt == ids[begin : begin + len(prompt)]
    with torch.no_grad():
        expected = model(**inputs).logits[0, packed.image_end :]
    torch.testing.assert_close(logits[begin : begin + len(prompt)], expected, atol=1e-4, rtol=1e-4)
