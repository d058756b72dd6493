"""What quantised weights and an FP8 cache change in logits and answers of the demo.

    python benchmarks/quantization.py [--json out.json]

The demo answers questions about drawn pictures, whose truth is known. Logits are compared along
the unquantised model's own answers and what it would go on with past their ends, where it is
unsure: each run computes them from the same tokens, prompts at once and answers token by token, as
in use. A difference is told as a share of the standard deviation of the unquantised logits.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mm_engine import LLM, SamplingParams
from mm_engine.models.quantization import decoder_linears
from mm_engine.plugins.discovery import default_model
from mm_engine.sequence import SampledToken
from mm_engine.sequence import Sequence as EngineSequence
from mm_engine.worker.verification import Verified
from record import begin, write

FIRST_SEED = 3_000_000_000  # of pictures that no training has seen
MAX_TOKENS = 48  # of an answer
NUM_COMPARED = 24  # tokens of an answer and of what comes past its end
VARIANTS: dict[str, dict[str, str]] = {
    "fp8": {"quantization": "fp8"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
    "int4, fp8 cache": {"quantization": "int4", "kv_cache_dtype": "fp8"},
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one picture, and the truth."""

    image: Image.Image
    text: str
    truth: str

    def conversation(self) -> list[dict[str, Any]]:
        """As `LLM.chat` takes it."""
        parts = [{"type": "image", "image": self.image}, {"type": "text", "text": self.text}]
        return [{"role": "user", "content": parts}]


def make_questions(number: int) -> list[Question]:
    """Three questions for each of some pictures, always the same."""
    path = Path(__file__).parents[1] / "training" / "pictures.py"
    spec = importlib.util.spec_from_file_location("painter", path)
    assert spec is not None and spec.loader is not None
    painter: Any = importlib.util.module_from_spec(spec)
    sys.modules["painter"] = painter  # dataclasses look their module up
    spec.loader.exec_module(painter)
    found: list[Question] = []
    for seed in range(FIRST_SEED, FIRST_SEED + number):
        rng = painter.evaluation_rng(seed)
        scene = painter.random_scene(rng)
        image = painter.draw(scene, 96, 96)
        all_of_it = painter.questions(scene, rng)
        for i in rng.permutation(len(all_of_it))[:3]:
            found.append(Question(image, *all_of_it[i][:2]))
        if len(found) >= number:
            break
    return found[:number]


@dataclass(slots=True)
class Run:
    """What one engine answered, and its logits along what the unquantised one says."""

    answers: list[list[int]]
    num_right: int
    said: list[list[int]]  # `NUM_COMPARED` tokens each: the unquantised model's
    logits: Tensor  # [questions, NUM_COMPARED, vocab]: what each of them was taken from
    weight_bytes: int  # of the text backbone's linear layers


def run(llm: LLM, questions: Sequence[Question], said: list[list[int]] | None) -> Run:
    """Answer freely, then once more with the tokens of `said`; None: the likeliest ones."""
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    conversations = [question.conversation() for question in questions]
    outputs = llm.chat(conversations, params, use_tqdm=False)
    pairs = zip(outputs, questions, strict=True)
    num_right = sum(output.outputs[0].text == question.truth for output, question in pairs)
    rows: dict[tuple[int, int], Tensor] = {}

    def launch(logits: Tensor, sequences: Sequence[EngineSequence]) -> Verified:
        taken = []
        for row, sequence in zip(logits, sequences, strict=True):
            index, place = sequence.request.sampling_params.seed, sequence.num_output_tokens
            assert index is not None
            rows[index, place] = row.float()
            taken.append(SampledToken(int(row.argmax()) if said is None else said[index][place]))
        return Verified.of(taken, logits.device)

    runner: Any = llm.engine.runner
    runner._runner.sampler.launch = launch
    # The seed, which greedy answers don't need, says whose answer it is.
    many = [
        SamplingParams(temperature=0.0, max_tokens=NUM_COMPARED, seed=i, ignore_eos=True)
        for i in range(len(questions))
    ]
    longer = llm.chat(conversations, many, use_tqdm=False)
    weights = 0
    for _, layer, _ in decoder_linears(runner._runner.model):
        plain = (layer.num_packed or layer.weight.numel()) * layer.weight.element_size()
        weights += sum(part.nbytes for part in layer.quantized) or plain
    logits = [rows[i, j] for i in range(len(questions)) for j in range(NUM_COMPARED)]
    return Run(
        answers=[list(output.outputs[0].token_ids) for output in outputs],
        num_right=num_right,
        said=[list(output.outputs[0].token_ids) for output in longer],
        logits=torch.stack(logits).unflatten(0, (-1, NUM_COMPARED)),
        weight_bytes=weights,
    )


def figures(base: Run, other: Run) -> dict[str, float]:
    """How far `other` is from `base`."""
    lens = torch.tensor([len(answer) for answer in base.answers])[:, None]
    inside = torch.arange(NUM_COMPARED) < lens
    off = (other.logits - base.logits) / base.logits.std()
    same = (other.logits.argmax(-1) == base.logits.argmax(-1)).float()
    pairs = list(zip(base.answers, other.answers, strict=True))
    return {
        "rms_logit_error": float(off.pow(2).mean().sqrt()),
        "max_logit_error": float(off.abs().max()),
        "greedy_agreement": float(same[inside].mean()),
        "greedy_agreement_past_the_end": float(same[~inside].mean()),
        "same_answers": sum(one == two for one, two in pairs) / len(pairs),
        "accuracy": other.num_right / len(pairs),
        "weight_bytes": other.weight_bytes,
    }


def main() -> None:
    """Measure, print, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=default_model())
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    head = begin("quantization", args.json)
    questions = make_questions(args.questions)

    def measure(said: list[list[int]] | None, **options: str) -> Run:
        llm = LLM(
            args.checkpoint,
            dtype=args.dtype,
            device=args.device,
            max_model_len=512,
            kv_cache_memory=1 << 28,
            enable_prefix_caching=False,
            progress=False,
            **options,
        )
        return run(llm, questions, said)

    base = measure(None)
    print(f"{'':16} rms error  max error  agreement  past the end  same answers  right  weights")
    variants = {}
    for name, options in {"none": {}, **VARIANTS}.items():
        told = figures(base, base if not options else measure(base.said, **options))
        print(
            f"{name:16} {told['rms_logit_error']:9.4f} {told['max_logit_error']:10.3f} "
            f"{told['greedy_agreement']:10.1%} {told['greedy_agreement_past_the_end']:13.1%} "
            f"{told['same_answers']:13.1%} {told['accuracy']:6.1%} "
            f"{told['weight_bytes'] / 2**20:5.2f} MiB",
            flush=True,
        )
        variants[name] = told
    record = {
        **head,
        "dtype": args.dtype,
        "checkpoint": Path(args.checkpoint).name,
        "questions": len(questions),
        "answer_tokens": sum(map(len, base.answers)),
        "compared_tokens": len(questions) * NUM_COMPARED,
        "variants": variants,
    }
    write(record, args.json)


if __name__ == "__main__":
    main()
