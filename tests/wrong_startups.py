"""What is done to the right plugin of `wrong_plugins.py` so that it is refused at startup.

The blocks are as in `wrong_statements.py`.
"""

#: Put in at the section's mark.
STARTUP_STATEMENTS = r"""
[model_class]

model-class-is-none
return None
=> expected a subclass of torch.nn.Module, got None

model-class-is-an-instance
return torch.nn.Identity()
=> expected a subclass of torch.nn.Module, got Identity

model-class-without-vision
return torch.nn.Identity
=> (expected an nn.Module with SupportsVision, got Identity|Identity\(ctx\) raised)

model-class-raises
{}[0]
=> raised KeyError: 0

model-class-exits
raise SystemExit(3)
=> raised SystemExit: 3

model-class-hangs
hang()
=> took longer than \S+ s

[init]

init-raises blames model_class
{}[0]
=> Model\(ctx\) raised KeyError: 0

init-exits blames model_class
raise SystemExit(3)
=> Model\(ctx\) raised SystemExit: 3

[load_weights]

weights-raise
{}[0]
=> raised KeyError: 0

weights-exit
raise SystemExit(3)
=> raised SystemExit: 3

weights-without-report
super().load_weights(weights)
return None
=> expected a WeightReport, got None

[max_tokens]

max-tokens-zero
return 0
=> expected an int of at least 1, got 0

max-tokens-a-text
return "576"
=> expected an int of at least 1, got str

max-tokens-a-float
return 576.0
=> expected an int of at least 1, got 576.0

max-tokens-too-small blames input_processor
return num_image_tokens(ctx.hf_config) - 1
=> expected at most \d+ placeholder tokens for image 0 \(what max_tokens says\), got \d+

max-tokens-raises
{}[0]
=> raised KeyError: 0

max-tokens-hangs
hang()
=> took longer than \S+ s

[register_input_mapper]

registers-nothing-callable
register("image", 3)
=> expected register\(str, function\), got register\(str, 3\)

registering-raises
{}[0]
=> raised KeyError: 0

registering-hangs
hang()
=> took longer than \S+ s

[dummy_data]

dummy-too-short
num_text -= 2
=> expected \d+ to \d+ tokens, got \d+

dummy-without-images
ids, images, num_text = (), (), seq_len
=> expected 1 image, got 0

dummy-a-text
return "<image>"
=> expected PromptInputs, got str

dummy-of-nothing
return PromptInputs()
=> expected either prompt or prompt_token_ids to be set

dummy-raises
{}[0]
=> raised KeyError: 0

dummy-exits
raise SystemExit(3)
=> raised SystemExit: 3

dummy-hangs
hang()
=> took longer than \S+ s

[placeholder_text]

placeholder-empty
return ""
=> expected a non-empty str, got str

placeholder-a-number
return 4
=> expected a non-empty str, got 4

placeholder-raises
{}[0]
=> raised KeyError: 0
"""

#: Replaced: the text above the arrow by the text below it.
EDITS = r"""
[register_input_mapper]

mapper-key-renamed blames embed_images
{"pixel_values": pixels, "width"
-->
{"pixels": pixels, "width"
=> expected the mapper's tensors \['pixels', 'width'\] as keywords, got \['pixel_values', 'width'\]

[embed_images]

keyword-renamed
def embed_images(self, *, pixel_values, width):
-->
def embed_images(self, *, pixel_values, widths):
=> expected the mapper's tensors \['pixel_values', 'width'\] as keywords, got \['pixel_values', 'w

[input_processor]

hook-misspelt blames input_procesor
def input_processor(ctx, inputs)
-->
def input_procesor(ctx, inputs)
=> there is no such hook. Did you mean input_processor\(ctx, inputs\)

argument-renamed
def input_processor(ctx, inputs)
-->
def input_processor(ctx, prompt)
=> expected input_processor\(ctx, inputs\), got an argument named prompt

hook-a-generator
    return expand_placeholders(
-->
    yield expand_placeholders(
=> expected a plain function, got a generator or coroutine

[max_tokens]

hook-a-coroutine
def max_tokens(
-->
async def max_tokens(
=> expected a plain function, got a generator or coroutine

hook-missing
@hookimpl
def max_tokens(
-->
def max_tokens(
=> a required hook is missing. The function is there; mark it with @hookimpl

[]

import-missing
import dataclasses
-->
import dataclasses, mm_no_such_package
=> can't be imported: \S+ raised ModuleNotFoundError: No module named 'mm_no_such_package'

import-exits
import dataclasses
-->
raise SystemExit("bye")
=> can't be imported: \S+ raised SystemExit: bye

import-of-a-name-that-is-gone
import PromptInputs,
-->
import PromptInput,
=> can't be imported: \S+ raised ImportError: cannot import name 'PromptInput'

syntax-wrong
import dataclasses
-->
import dataclasses as
=> isn't Python
"""
