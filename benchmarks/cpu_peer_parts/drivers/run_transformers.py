"""transformers' `generate` on a static batch."""

from __future__ import annotations

from typing import Any

from protocol import Events, picture, serve, versions

loaded: dict[str, Any] = {}


def load(
    model: str, dtype: str, threads: int, max_model_len: int, max_num_seqs: int, kv_bytes: int
) -> dict[str, Any]:
    """Import, load, be ready to answer. Its cache grows with the batch: nothing is set apart."""
    import torch
    import transformers
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    torch.set_num_threads(threads)
    loaded["dtype"] = getattr(torch, dtype)
    loaded["model"] = transformers.LlavaForConditionalGeneration.from_pretrained(
        model, dtype=loaded["dtype"]
    ).eval()
    loaded["processor"] = AutoImageProcessor.from_pretrained(model)
    return {"versions": versions("transformers", "torch"), "kv_bytes": 0}


def answer(
    prompts: list[list[int]], num_tokens: int, images: list[int], image_size: int
) -> dict[str, Any]:
    """`num_tokens` for each prompt, greedily; image i is for prompt i."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    model = loaded["model"]
    config = model.config
    pictures = [picture(seed, image_size) for seed in images]
    count, events = len(prompts), Events()
    patches = (image_size // config.vision_config.patch_size) ** 2
    expanded = [
        [t for i in ids for t in ([i] * patches if i == config.image_token_id else [i])]
        for ids in prompts
    ]

    class Watch(StoppingCriteria):
        """Asked after each step; stops nothing."""

        num_steps = 0

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.num_steps += 1
            is_first, is_last = self.num_steps == 1, self.num_steps == num_tokens
            events.tell(count * is_first, count, count * is_last)
            return torch.zeros(count, dtype=torch.bool)

    batch = torch.tensor(expanded)
    pixels = {}
    if pictures:
        mapped = loaded["processor"](pictures, return_tensors="pt")["pixel_values"]
        pixels["pixel_values"] = mapped.to(loaded["dtype"])
    with torch.inference_mode():
        out = model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([Watch()]),
            **pixels,
        )
    return events.answer(out[:, batch.shape[1]].tolist())


if __name__ == "__main__":
    serve({"load": load, "answer": answer})
