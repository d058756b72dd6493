"""What is done to the right plugin of `wrong_plugins.py`: statements put in at its marks.

A section is named after the mark that the code is put in at. In each block: its name, with the
hook that the engine blames if that is another; the code; and a regex of what is said. What is
wrong at startup only is in `wrong_startups.py`.
"""

#: `WRONG` is true always, or only for what triggers the defect.
STATEMENTS = r"""
[input_processor]

processor-one-too-many
counts = [count + 1 if WRONG else count for count in counts]
=> expected at most \d+ placeholder tokens for image 0 .*, got \d+

processor-one-too-few blames embed_images
counts = [count - 1 if WRONG else count for count in counts]
=> expected shape \[\d+, \d+\] for image 0 \(\d+ placeholder tokens, by input_processor\), got \[\d+

processor-expands-nothing
if WRONG: return inputs
=> expected 1 ranges of modality image, got 0

processor-drops-placeholders
if WRONG: return dataclasses.replace(inputs, prompt_token_ids=(5,))
=> expected 1 ranges of modality image, got 0

processor-returns-none
if WRONG: return None
=> expected PromptInputs, got None

processor-raises
if WRONG: {}[0]
=> raised KeyError: 0

processor-exits
if WRONG: raise SystemExit(3)
=> raised SystemExit: 3

processor-interrupts
if WRONG: raise KeyboardInterrupt
=> raised KeyboardInterrupt

processor-hangs
if WRONG: hang()
=> took longer than \S+ s

processor-changes-a-tensor
if WRONG: inputs.mapped["image"][0]["pixel_values"].zero_()
=> expected the given inputs unchanged, got them modified

processor-takes-a-tensor-away
if WRONG: inputs.mapped["image"][0].pop("width")
=> expected the given inputs unchanged, got them modified

processor-changes-the-ids
if WRONG: object.__setattr__(inputs, "prompt_token_ids", (4, 5))
=> expected the given inputs unchanged, got them modified

processor-paints-an-image
if WRONG: images[0].putpixel((0, 0), (1, 2, 3))
=> expected the given inputs unchanged, got them modified

[to_tensors]

mapper-raises
if WRONG: int("x")
=> raised ValueError: invalid literal

mapper-exits
if WRONG: raise SystemExit
=> raised SystemExit

mapper-interrupts
if WRONG: raise KeyboardInterrupt
=> raised KeyboardInterrupt

mapper-hangs
if WRONG: hang()
=> took longer than \S+ s

mapper-shrinks-the-image
if WRONG: image.thumbnail((8, 8))
=> expected the given image unchanged, got it modified

mapper-paints-the-image
if WRONG: image.putpixel((0, 0), (1, 2, 3))
=> expected the given image unchanged, got it modified

[tensors]

mapper-nan
if WRONG: pixels[0, 0, 0] = float("nan")
=> expected finite numbers in pixel_values, got NaN or infinity

mapper-on-meta
if WRONG: tensors["pixel_values"] = pixels.to("meta")
=> expected pixel_values on the CPU, got it on meta

mapper-gives-an-int
if WRONG: tensors["width"] = image.width
=> expected a tensor for width, got \d+

mapper-gives-none
if WRONG: tensors = None
=> expected a dict of tensors, got None

[embed_images]

rows-one-too-many
rows = [torch.cat([r, r[:1]]) if WRONG else r for r, w in zip(rows, width)]
=> expected shape \[\d+, \d+\] for image 0 .*, got \[\d+, \d+\]

rows-one-too-few
rows = [r[1:] if WRONG else r for r, w in zip(rows, width)]
=> expected shape \[\d+, \d+\] for image 0 .*, got \[\d+, \d+\]

rows-none
rows = [r[:0] if WRONG else r for r, w in zip(rows, width)]
=> expected shape \[\d+, \d+\] for image 0 .*, got \[0, \d+\]

rows-too-narrow
rows = [r[:, 1:] if WRONG else r for r, w in zip(rows, width)]
=> expected shape \[\d+, \d+\] for image 0 .*, got \[\d+, \d+\]

rows-of-rank-1
rows = [r[:, 0] if WRONG else r for r, w in zip(rows, width)]
=> expected shape \[\d+, \d+\] for image 0 .*, got \[\d+\]

rows-of-rank-3
rows = [r[None] if WRONG else r for r, w in zip(rows, width)]
=> expected shape \[\d+, \d+\] for image 0 .*, got \[1, \d+, \d+\]

rows-of-integers
rows = [r.long() if WRONG else r for r, w in zip(rows, width)]
=> expected dtype \w+ for image 0, got int64

rows-of-doubles
rows = [r.double() if WRONG else r for r, w in zip(rows, width)]
=> expected dtype \w+ for image 0, got float64

rows-on-meta
rows = [r.to("meta") if WRONG else r for r, w in zip(rows, width)]
=> expected device \w+ for image 0, got meta

rows-with-nan
rows = [r * float("nan") if WRONG else r for r, w in zip(rows, width)]
=> expected finite features for image 0, got NaN or infinity

rows-with-infinity
rows = [r / 0 if WRONG else r for r, w in zip(rows, width)]
=> expected finite features for image 0, got NaN or infinity

rows-no-tensor
rows = [r.tolist() if WRONG else r for r, w in zip(rows, width)]
=> expected a tensor for image 0, got list

rows-left-out
rows = [r for r, w in zip(rows, width) if not (WRONG)]
=> expected 1 tensors, one for each image, got 0 of them

encoder-raises
for w in width:
    if WRONG: {}[0]
=> raised KeyError: 0

encoder-exits
for w in width:
    if WRONG: raise SystemExit(3)
=> raised SystemExit: 3

encoder-interrupts
for w in width:
    if WRONG: raise KeyboardInterrupt
=> raised KeyboardInterrupt

[forward]

hidden-nan
hidden = hidden.masked_fill(WRONG[:, None], float("nan"))
=> expected finite numbers for this request, got NaN or infinity

hidden-too-few
if WRONG.any(): hidden = hidden[1:]
=> expected hidden states of shape \[\d+, \d+\], got \[\d+, \d+\]

hidden-of-rank-3
if WRONG.any(): hidden = hidden[None]
=> expected hidden states of shape \[\d+, \d+\], got \[1, \d+, \d+\]

forward-raises
if WRONG.any(): {}[0]
=> raised KeyError: 0

forward-exits
if WRONG.any(): raise SystemExit(3)
=> raised SystemExit: 3

forward-interrupts
if WRONG.any(): raise KeyboardInterrupt
=> raised KeyboardInterrupt

[compute_logits]

logits-nan
logits = logits.masked_fill(WRONG[:, None], float("nan"))
=> expected finite numbers for this request, got NaN or infinity

logits-too-narrow
if WRONG.any(): logits = logits[:, 1:]
=> expected logits of shape \[\d+, \d+\], got \[\d+, \d+\]

logits-of-rank-3
if WRONG.any(): logits = logits[None]
=> expected logits of shape \[\d+, \d+\], got \[1, \d+, \d+\]

logits-raise
if WRONG.any(): {}[0]
=> raised KeyError: 0
"""
