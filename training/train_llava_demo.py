"""Train the demo checkpoint of mm-llava from nothing: pictures, tokenizer, tower, decoder.

Each stage ends in a file in the work folder; a stage whose file is there is not run again, so
that a stopped run goes on where it was. Files of a former recipe have to be removed by hand.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from decoder import Packer, train_decoder
from evaluate import evaluate, report
from model import fresh_model
from tokenizer import make_processor, train_tokenizer
from tower import PatchHeads, train_tower

SEED = 20
DEMO = Path(__file__).parent.parent / "plugins" / "mm_llava" / "mm_llava" / "demo"
SEEDS_A_STAGE = 100_000_000
"""Each stage draws pictures from seeds of its own."""


def main() -> None:
    """Run the stages that are not done yet, save the checkpoint and evaluate it."""
    args = _arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    processor = make_processor(tokenizer)
    model = fresh_model(tokenizer)
    config = model.config
    heads = nn.ModuleDict(  # what training reads the model's insides with
        {
            "patch": PatchHeads(config.vision_config.hidden_size),
            "hint": nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size),
        }
    )

    def keep(path: Path) -> None:
        torch.save({"model": model.state_dict(), "heads": heads.state_dict()}, path)

    def tower_stage(num_steps: int, rate: float, first_seed: int, partial: Path) -> None:
        train_tower(
            model.model.vision_tower,
            heads["patch"],
            num_steps=num_steps,
            batch_size=args.tower_batch_size,
            rate=rate,
            first_seed=first_seed,
            on_report=lambda step: keep(partial),
        )

    def decoder_stage(num_steps: int, rate: float, first_seed: int, partial: Path) -> None:
        train_decoder(
            model,
            heads["hint"],
            Packer(tokenizer, image_tokens=config.image_seq_length),
            num_steps=num_steps,
            batch_size=args.decoder_batch_size,
            rate=rate,
            first_seed=first_seed,
            on_report=lambda step: keep(partial),
        )

    stages = (
        ("tower", tower_stage, args.tower_steps, 6e-3),
        ("tower_again", tower_stage, args.tower_again_steps, 4e-3),
        ("decoder", decoder_stage, args.decoder_steps, 4e-3),
    )
    for number, (name, run, num_steps, rate) in enumerate(stages):
        path = args.work / f"{name}.pt"
        if path.exists():
            state = torch.load(path)
            model.load_state_dict(state["model"])
            heads.load_state_dict(state["heads"])
            print(f"{name}: taken from {path}", flush=True)
            continue
        started = time.monotonic()
        run(num_steps, rate, number * SEEDS_A_STAGE, path.with_suffix(".partial"))
        keep(path)
        print(f"{name}: trained in {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    save_checkpoint(model, processor, args.out)
    print(report(evaluate(args.out, num_questions=args.questions, dtype=torch.bfloat16)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DEMO, help="where the checkpoint goes")
    parser.add_argument("--work", type=Path, default=Path("build/demo-work"), help="stages' files")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tower-batch-size", type=int, default=32, help="pictures a step")
    parser.add_argument("--tower-steps", type=int, default=1200)
    parser.add_argument("--tower-again-steps", type=int, default=1800)
    parser.add_argument("--decoder-batch-size", type=int, default=16, help="pictures a step")
    parser.add_argument("--decoder-steps", type=int, default=5000)
    parser.add_argument("--questions", type=int, default=2000, help="how many to evaluate on")
    return parser.parse_args()


def save_checkpoint(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path
) -> None:
    """Write the model in bfloat16 and the processor as transformers loads them."""
    rounded = LlavaForConditionalGeneration(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config.do_sample = False
    rounded.save_pretrained(out)
    processor.save_pretrained(out)
    processor.image_processor.save_pretrained(out)


if __name__ == "__main__":
    main()
