"""Plugins that are each wrong in one thing, and what `engine plugins check` must say of them."""

from __future__ import annotations

from wrong_plugins import RIGHT, WRONG_PLUGINS, edited


def with_model(*lines: str, mark: str) -> str:
    """The right plugin with statements at a mark in its model."""
    indent = {"init": 8, "embed_images": 8, "forward": 8, "compute_logits": 8}[mark] * " "
    return edited((f"{indent}# {mark}\n", "".join(f"{indent}{line}\n" for line in lines)))


def with_method(source: str) -> str:
    """The right plugin with one more method of its model."""
    place = "    def forward(self, input_ids"
    return edited((place, f"    {source}\n\n{place}"))


#: Check, hook, what is expected and what was got (parts of it), the plugin.
WRONG = {
    "count-one-too-many-by-default": (
        "counts",
        "max_tokens",
        "16 placeholder tokens for an image of 1x1 pixels",
        "17",
        RIGHT[: RIGHT.index("@hookimpl\ndef input_processor")].replace(
            "return num_image_tokens(ctx.hf_config)", "return num_image_tokens(ctx.hf_config) + 1"
        ),
    ),
    "count-wrong-in-the-processor": (
        "counts",
        "input_processor",
        "for an image of 1x1 pixels, the smallest found (at 25 of 25 sizes tried): so many rows",
        "15",
        WRONG_PLUGINS["processor-one-too-few"].source,
    ),
    "count-wrong-for-wide-images": (
        "counts",
        "input_processor",
        "16 placeholder tokens for an image of 51x1 pixels, the smallest found",
        "15",
        WRONG_PLUGINS["processor-one-too-few-when-wide"].source,
    ),
    "rows-one-too-few": (
        "counts",
        "embed_images",
        "16 rows for an image of 1x1 pixels",
        "15",
        WRONG_PLUGINS["rows-one-too-few"].source,
    ),
    "class-token-kept": (
        "counts",
        "embed_images",
        "16 rows for an image of 1x1 pixels",
        "17",
        with_model("self.drop_first = False", "self.strategy = 'full'", mark="init")
        .replace(
            "rows = super().embed_images(pixel_values=pixel_values)",
            "states = tower_features(self.vision_tower, pixel_values)\n"
            "        rows = list(self.multi_modal_projector(states[0]))",
        )
        .replace("import torch\n", "import torch\nfrom mm_engine.models import tower_features\n"),
    ),
    "rows-and-count-wrong-together": (
        "counts",
        "input_processor and embed_images",
        "16 rows for an image of 1x1 pixels",
        "15 placeholder tokens, 15 rows",
        edited(
            ("        # embed_images\n", "        rows = [r[1:] for r in rows]\n"),
            ("    # input_processor\n", "    counts = [count - 1 for count in counts]\n"),
        ),
    ),
    "max-tokens-too-small": (
        "max-tokens",
        "max_tokens",
        "at least 16",
        "15",
        edited(("    # max_tokens\n", "    return 15\n")),
    ),
    "max-tokens-too-large": (
        "max-tokens",
        "max_tokens",
        "16: nothing that was tried takes more, nor dummy_data",
        "160",
        edited(("    # max_tokens\n", "    return 160\n")),
    ),
    "dummy-too-short": (
        "dummy-data",
        "dummy_data",
        "17 to 512 tokens from dummy_data(ctx, 17, {'image': 1})",
        "16",
        edited(("*text * max(1, num_text)", "*text * (num_text - 2)")),
    ),
    "dummy-without-the-images": (
        "dummy-data",
        "dummy_data",
        "2 images from dummy_data(ctx, 33, {'image': 2})",
        "1",
        edited(('range(counts.get("image", 0))', 'range(min(1, counts.get("image", 0)))')),
    ),
    "mapper-key-renamed": (
        "mapper-keys",
        "register_input_mapper",
        "tensors named as embed_images' keywords: ['pixel_values', 'width']",
        "['pixels', 'width']",
        edited(('{"pixel_values": pixels,', '{"pixels": pixels,')),
    ),
    "keyword-renamed": (
        "mapper-keys",
        "register_input_mapper or embed_images",
        "tensors named as embed_images' keywords: ['pixel_values', 'widths']",
        "['pixel_values', 'width']",
        WRONG_PLUGINS["keyword-renamed"].source,
    ),
    "keyword-unlike-the-image-processors": (
        "mapper-keys",
        "embed_images",
        "keywords named as the image processor's tensors: ['pixel_values']",
        "['pixels']",
        edited(
            (
                "def embed_images(self, *, pixel_values, width):",
                "def embed_images(self, *, pixels):",
            ),
            (
                "super().embed_images(pixel_values=pixel_values)",
                "super().embed_images(pixel_values=pixels)",
            ),
            (', "width": torch.tensor([image.width])}', "}"),
        ),
    ),
    "keywords-wrong-for-the-default-mapper": (
        "mapper-keys",
        "embed_images",
        "keywords named as the image processor's tensors: ['pixel_values']",
        "['pixels']",
        'ARCHITECTURES = ["LlavaForConditionalGeneration"]\n'
        "from mm_llava.plugin import *\nfrom mm_engine.plugins import hookimpl\n"
        "from mm_llava.model import LlavaForConditionalGeneration\n"
        "class Model(LlavaForConditionalGeneration):\n"
        "    def embed_images(self, *, pixels): return super().embed_images(pixel_values=pixels)\n"
        "@hookimpl\ndef model_class(ctx): return Model\n",
    ),
    "mapper-in-half-precision": (
        "mapper-tensors",
        "register_input_mapper",
        "float32 numbers in pixel_values",
        "Tensor (float16, [3, 32, 32])",
        edited(("        # tensors\n", "        tensors['pixel_values'] = pixels.half()\n")),
    ),
    "mapper-keeps-the-batch-dimension": (
        "counts",
        "embed_images",
        "no exception",
        "raised ",
        edited(('["pixel_values"][0]', '["pixel_values"]')),
    ),
    "mapper-that-draws-lots": (
        "mapper-tensors",
        "register_input_mapper",
        "the same pixel_values each time",
        "two that differ",
        edited(("        # tensors\n", "        pixels += torch.rand(1)\n")),
    ),
    "mapper-paints-the-image": (
        "mapper-tensors",
        "register_input_mapper",
        "the given image unchanged",
        "it modified",
        WRONG_PLUGINS["mapper-paints-the-image"].source,
    ),
    "mapper-exits": (
        "mapper-tensors",
        "register_input_mapper",
        "no exception",
        "raised SystemExit",
        WRONG_PLUGINS["mapper-exits-when-wide"].source,
    ),
    "processor-changes-a-tensor": (
        "processor",
        "input_processor",
        "the given inputs unchanged",
        "them modified",
        WRONG_PLUGINS["processor-changes-a-tensor-when-wide"].source,
    ),
    "processor-counts-in-the-wrong-order": (
        "processor",
        "input_processor",
        "[16, 16, 16] tokens for 3 images, as each takes alone",
        "[16, 17, 18]",
        edited(("    # input_processor\n", "    counts = [c + i for i, c in enumerate(counts)]\n")),
    ),
    "processor-that-needs-the-text": (
        "processor",
        "input_processor",
        "no exception",
        "raised AttributeError: 'NoneType' object has no attribute 'count'",
        edited(("    # input_processor\n", "    inputs.prompt.count('<image>')\n")),
    ),
    "processor-asserts-on-the-users-fault": (
        "wrong-placeholders",
        "input_processor",
        "a RequestError for 0 placeholders and 1 images",
        "raised AssertionError",
        edited(
            (
                "    # input_processor\n",
                "    assert inputs.prompt_token_ids.count(4) == len(images)\n",
            )
        ),
    ),
    "placeholder-text-without-the-token": (
        "placeholder-text",
        "placeholder_text",
        "a text with one token <image> (id 4) for image 0",
        "'<picture>' with 0 of it",
        edited(("    # placeholder_text\n", "    return '<picture>'\n")),
    ),
    "rows-of-a-fixed-dtype": (
        "encoder-output",
        "embed_images",
        "bfloat16 rows from a bfloat16 model",
        "float32",
        with_model("rows = [r.float() for r in rows]", mark="embed_images"),
    ),
    "rows-of-doubles": (
        "encoder-output",
        "embed_images",
        "float32 rows from a float32 model",
        "float64",
        WRONG_PLUGINS["rows-of-doubles"].source,
    ),
    "rows-too-narrow": (
        "encoder-output",
        "embed_images",
        "a tensor [num_tokens, 64] for an image of 32x32 pixels",
        "Tensor (float32, [16, 63])",
        WRONG_PLUGINS["rows-too-narrow"].source,
    ),
    "rows-with-nan-for-wide-images": (
        "encoder-output",
        "embed_images",
        "finite numbers for an image of 64x32 pixels",
        "NaN or infinity",
        WRONG_PLUGINS["rows-with-nan-when-wide"].source,
    ),
    "rows-that-depend-on-the-batch": (
        "same-in-batch",
        "embed_images",
        "the same rows for image 0 among 4 as alone",
        "off by up to 0.3 where",
        with_model("rows = [r + 0.1 * len(rows) for r in rows]", mark="embed_images"),
    ),
    "state-from-encoding": (
        "same-from-cache",
        "forward",
        "the same answer from cached features",
        "logits of token 0 off by up to",
        edited(
            ("        # embed_images\n", "        self.fresh = True\n"),
            (
                "        # forward\n",
                "        if not getattr(self, 'fresh', False): hidden = hidden * 1.1\n"
                "        self.fresh = False\n",
            ),
        ),
    ),
    "answer-that-depends-on-the-chunk": (
        "same-in-chunks",
        "forward",
        "the same answer in chunks of 8 tokens",
        "logits of token 0 off by up to",
        with_model("if 4 < len(input_ids) < 12: hidden = hidden * 1.1", mark="forward"),
    ),
    "normalised-otherwise": (
        "parity-pixel-values",
        "register_input_mapper",
        "transformers' pixel_values, for an image of 71x29 pixels",
        "off by up to 0.1 where numbers go up to",
        edited(("        # tensors\n", "        pixels += 0.1\n")),
    ),
    "another-feature-layer": (
        "parity-tower",
        "embed_images",
        "transformers' input of multi_modal_projector, for an image of 71x29 pixels",
        "off by up to",
        edited(
            (
                "        super().__init__(ctx)\n",
                "        ctx.hf_config.vision_feature_layer = -1\n"
                "        super().__init__(ctx)\n        ctx.hf_config.vision_feature_layer = -2\n",
            ),
        ),
    ),
    "another-activation": (
        "parity-projector",
        "embed_images",
        "transformers' output of multi_modal_projector, for an image of 71x29 pixels",
        "off by up to",
        with_model("self.multi_modal_projector.act = torch.nn.ReLU()", mark="init"),
    ),
    "rows-in-another-order": (
        "parity-image-rows",
        "embed_images",
        "transformers' rows of get_image_features, for an image of 71x29 pixels",
        "16 of 16 rows differ, the first is row 0",
        with_model("rows = [r.flip(0) for r in rows]", mark="embed_images"),
    ),
    "scaled-text-embeddings": (
        "parity-merged",
        "embed_tokens",
        "transformers' embeddings of a prompt with 1 images",
        "the first is row 0",
        with_method("def embed_tokens(self, ids): return super().embed_tokens(ids) * 1.1"),
    ),
    "scaled-hidden-states": (
        "parity-logits",
        "forward",
        "transformers' logits after a prompt with 1 images",
        "off by up to",
        with_model("hidden = hidden * 1.1", mark="forward"),
    ),
    "positions-off-in-decode": (
        "parity-text",
        "forward",
        "transformers' greedy answer: [",
        "which parts at token",
        edited(
            (
                "        marked = input_ids == self.marker\n        hidden",
                "        marked = input_ids == self.marker\n"
                "        positions = positions + 9 * (len(positions) < 4)\n        hidden",
            )
        ),
    ),
    "a-layer-left-out": (
        "weights-load",
        "load_weights",
        "every tensor that the model's answers depend on to be taken, such as",
        "9 of the checkpoint's",
        with_model("del self.language_model.layers[1]", mark="init"),
    ),
    "parameters-that-the-checkpoint-lacks": (
        "model-builds",
        "model_class",
        "a model of which the checkpoint has every tensor, in its shape",
        "of the model's tensors, extra.weight among them",
        with_model("self.extra = torch.nn.Linear(2, 2, bias=False)", mark="init"),
    ),
    "model-that-cannot-be-built": (
        "model-builds",
        "model_class",
        "no exception",
        "Model(ctx) raised KeyError: 0",
        WRONG_PLUGINS["init-raises"].source,
    ),
    "placeholder-text-raises": (
        "checkpoint-opens",
        "placeholder_text",
        "no exception",
        "raised KeyError: 'picture'",
        edited(("    # placeholder_text\n", "    {}['picture']\n")),
    ),
    "mapper-that-counts-its-calls": (
        "image-modes",
        "register_input_mapper",
        "for a picture of mode RGB what its conversion to RGB gives",
        "another pixel_values",
        edited(
            ("class Model(", "calls = []\n\n\nclass Model("),
            ("        # tensors\n", "        calls.append(0); pixels[0] = (len(calls) - 1) // 2\n"),
        ),
    ),
    "hook-misspelt": (
        "hooks-fit",
        "input_procesor",
        "what the hook's specification says",
        "marked with @hookimpl, but there is no such hook",
        WRONG_PLUGINS["hook-misspelt"].source,
    ),
    "import-exits": (
        "hooks-fit",
        None,
        "a plugin that the engine can start with",
        "raised SystemExit: bye",
        WRONG_PLUGINS["import-exits"].source,
    ),
    "syntax-wrong": (
        "hooks-fit",
        None,
        "a plugin that the engine can start with",
        "SyntaxError: invalid syntax",
        WRONG_PLUGINS["syntax-wrong"].source,
    ),
}
