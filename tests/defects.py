"""Defects put into a copy of mm-llava-next, and whom `engine plugins check` must blame for each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "plugins" / "mm_llava_next" / "mm_llava_next"
ARCHITECTURE = "LlavaNextForConditionalGeneration"

#: A mapper of its own, as the package has none: core's default, then what is put in.
MAPPER = """
from mm_engine.plugins.defaults import map_image

@hookimpl
def register_input_mapper(ctx, register):
    def mapper(ctx, image):
        tensors = map_image(ctx, image)
        {}
        return tensors
    register("image", mapper)
"""


@dataclass(frozen=True)
class Defect:
    """What is replaced in the package's source, or done in a mapper; who is to be blamed."""

    check: str
    hook: str
    edits: tuple[tuple[str, str], ...] = ()
    mapper: str = ""

    def source(self) -> str:
        """The whole plugin in one file, with the defect."""
        source = in_one_file()
        for old, new in self.edits:
            if source.count(old) != 1:
                raise ValueError(f"not once in mm-llava-next: {old!r}")
            source = source.replace(old, new)
        return source + (MAPPER.format(self.mapper) if self.mapper else "")


def in_one_file() -> str:
    """mm-llava-next as a one-file plugin."""
    parts = [f'from __future__ import annotations\nARCHITECTURES = ["{ARCHITECTURE}"]\n']
    for name in ("counts", "model", "plugin"):
        text = (PACKAGE / f"{name}.py").read_text("utf-8")
        text = re.sub(r"^ *from mm_llava_next\S* import (\([^)]*\)|.*)\n", "", text, flags=re.M)
        parts.append(text.replace("from __future__ import annotations\n", ""))
    return "\n".join(parts)


COUNT = "return self.side**2 + self.height * (self.width + 1)"
FEATURES = "select_features(states, self.config.vision_feature_select_strategy)"
TOWER = "build_vision_tower(config.vision_config, config.vision_feature_layer)"
LINES = "torch.cat([lines, newline], dim=1).flatten(0, 1)"
TOP = "int(round(height * (full_width / width), 7))"
LEFT = "int(round(width * (full_height / height), 7))"
PROCESSOR, MODEL, INPUTS = "input_processor", "embed_images", "register_input_mapper"
BOTH = f"{PROCESSOR} and {MODEL}"

NEGATE = 'inputs.mapped["image"][0]["pixel_values"].neg_()'
HALVE = "[pictures.mul_(0.5) for pictures in pixel_values]"

DEFECTS = {
    "count off by one": Defect("counts", PROCESSOR, ((COUNT, f"{COUNT} - 1"),)),
    "newline forgotten": Defect("counts", MODEL, ((LINES, "lines.flatten(0, 1)"),)),
    "newline forgotten in the count": Defect(
        "counts", PROCESSOR, (("self.height * (self.width + 1)", "self.height * self.width"),)
    ),
    "h and w swapped": Defect(
        "counts", PROCESSOR, (("height, width = item[", "width, height = item["),)
    ),
    "h and w swapped in the model": Defect(
        "counts", MODEL, (("layout(self.config, *size)", "layout(self.config, *size[::-1])"),)
    ),
    "h and w swapped in the mapper": Defect(
        "counts", INPUTS, mapper='tensors["image_sizes"] = tensors["image_sizes"].flip(0)'
    ),
    "wrong feature layer": Defect(
        "parity-tower", MODEL, ((TOWER, "build_vision_tower(config.vision_config, -1)"),)
    ),
    "CLS kept": Defect("parity-tower", MODEL, ((FEATURES, 'select_features(states, "full")'),)),
    "mapper key renamed": Defect(
        "mapper-keys", INPUTS, mapper='tensors["pixels"] = tensors.pop("pixel_values")'
    ),
    "max too small": Defect(
        "max-tokens",
        "max_tokens",
        (("return max(sizes, key", "return min(sizes, key"),),
    ),
    "dummy too short": Defect(
        "dummy-data",
        "dummy_data",
        (("return dummy_prompt(ctx, seq_len,", "return dummy_prompt(ctx, seq_len - 9,"),),
    ),
    "input mutated": Defect(
        "processor",
        PROCESSOR,
        (("    counts = []\n", f"    counts = []\n    {NEGATE}\n"),),
    ),
    "input mutated by the mapper": Defect(
        "mapper-tensors", INPUTS, mapper="image.paste((0, 0, 0), (0, 0, 1, 1))"
    ),
    "input mutated by the model": Defect(
        "encoder-output",
        MODEL,
        (("        states = tower", f"        {HALVE}\n        states = tower"),),
    ),
    "dummy not the costliest": Defect(
        "dummy-data", "dummy_data", (("size=(width, height))", "size=(20, 20))"),)
    ),
    "wrong dtype": Defect(
        "encoder-output",
        MODEL,
        (("return [self.pack(rows, place) for", "return [self.pack(rows, place).float() for"),),
    ),
    "wrong dtype of the mapper's tensors": Defect(
        "mapper-tensors", INPUTS, mapper='tensors["pixel_values"] = tensors["pixel_values"].half()'
    ),
    "unpad by int": Defect(
        "counts",
        BOTH,
        (
            (TOP, "int(height * (full_width / width))"),
            (LEFT, "int(width * (full_height / height))"),
        ),
    ),
    "hook misspelt": Defect(
        "hooks-fit",
        "inputs_processor",
        (("def input_processor(", "def inputs_processor("),),
    ),
}
