"""Train the demo checkpoint of mm-llava from nothing: pictures, tokenizer, tower, decoder.

Each stage ends in a file in the work folder; a stage whose file is there is not run again, so
that a stopped run goes on where it was. Files of a former recipe have to be removed by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from batches import Batch, training_batch
from decoder import Packer, train_decoder
from evaluate import evaluate, report
from model import fresh_model
from recipe import SEEDS_A_STAGE, Stage, run_stages, save_checkpoint
from tokenizer import make_processor, train_tokenizer
from tower import PatchHeads, train_tower

SEED = 20
DEMO = Path(__file__).parent.parent / "plugins" / "mm_llava" / "mm_llava" / "demo"


def main() -> None:
    """Run the stages that are not done yet, save the checkpoint and evaluate it."""
    args = _arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
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

    def train_tower_stage(
        num_steps: int, rate: float, first_seed: int, on_report: Callable[[int], None]
    ) -> None:
        train_tower(
            model.model.vision_tower,
            heads["patch"],
            num_steps=num_steps,
            batch_size=args.tower_batch_size,
            rate=rate,
            first_seed=first_seed,
            on_report=on_report,
        )

    def image_states(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            features = model.model.vision_tower(batch.pixel_values).last_hidden_state[:, 1:]
        return model.model.multi_modal_projector(features)

    def train_decoder_stage(
        num_steps: int, rate: float, first_seed: int, on_report: Callable[[int], None]
    ) -> None:
        train_decoder(
            model,
            heads["hint"],
            Packer(tokenizer),
            draw_batch=training_batch,
            image_states=image_states,
            num_steps=num_steps,
            batch_size=args.decoder_batch_size,
            rate=rate,
            first_seed=first_seed,
            on_report=on_report,
        )

    stages = (
        Stage("tower", train_tower_stage, args.tower_steps, 6e-3, 0),
        Stage("tower_again", train_tower_stage, args.tower_again_steps, 4e-3, SEEDS_A_STAGE),
        Stage("decoder", train_decoder_stage, args.decoder_steps, 4e-3, 2 * SEEDS_A_STAGE),
    )
    run_stages(stages, model, heads, args.work)
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


if __name__ == "__main__":
    main()
