"""Train the demo checkpoint of mm-llava-next from mm-llava's: first the tower, then the decoder.

Each stage ends in a file in the work folder; a stage whose file is there is not run again, so
that a stopped run goes on where it was. Files of a former recipe have to be removed by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from decoder import Packer, train_decoder
from evaluate import evaluate, report
from recipe import SEEDS_A_STAGE, Stage, run_stages, save_checkpoint
from tiled_model import tiled_image_states, tiled_model, tiled_processor
from tiled_tower import train_tiled_tower
from tower import PatchHeads
from views import TiledBatch, tiled_batch

SEED = 21
PLUGINS = Path(__file__).parent.parent / "plugins"
START = PLUGINS / "mm_llava" / "mm_llava" / "demo"
DEMO = PLUGINS / "mm_llava_next" / "mm_llava_next" / "demo"
FIRST_STAGE = 4
"""The stages' place after those of the LLaVA demo, whose seeds they don't use again."""


def main() -> None:
    """Run the stages that are not done yet, save the checkpoint and evaluate it."""
    args = _arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    model = tiled_model(args.start)
    processor = tiled_processor(args.start)
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
        train_tiled_tower(
            model.model.vision_tower,
            heads["patch"],
            num_steps=num_steps,
            num_wholes=args.tower_wholes,
            num_tiled=args.tower_tiled,
            rate=rate,
            first_seed=first_seed,
            on_report=on_report,
        )

    def image_states(batch: TiledBatch) -> torch.Tensor:
        return tiled_image_states(model, batch)

    def train_decoder_stage(
        num_steps: int, rate: float, first_seed: int, on_report: Callable[[int], None]
    ) -> None:
        train_decoder(
            model,
            heads["hint"],
            Packer(processor.tokenizer),
            draw_batch=tiled_batch,
            image_states=image_states,
            num_steps=num_steps,
            batch_size=args.decoder_batch_size,
            rate=rate,
            first_seed=first_seed,
            on_report=on_report,
        )

    seeds = FIRST_STAGE * SEEDS_A_STAGE
    stages = (
        Stage("tower", train_tower_stage, args.tower_steps, 3e-3, seeds),
        Stage("decoder", train_decoder_stage, args.decoder_steps, 3e-3, seeds + SEEDS_A_STAGE),
    )
    run_stages(stages, model, heads, args.work)
    save_checkpoint(model, processor, args.out)
    print(report(evaluate(args.out, num_questions=args.questions, dtype=torch.bfloat16)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--start", type=Path, default=START, help="the LLaVA demo to start from")
    parser.add_argument("--out", type=Path, default=DEMO, help="where the checkpoint goes")
    parser.add_argument(
        "--work", type=Path, default=Path("build/next-demo-work"), help="stages' files"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tower-wholes", type=int, default=24, help="whole pictures a step")
    parser.add_argument("--tower-tiled", type=int, default=8, help="of these, tiled a step")
    parser.add_argument("--tower-steps", type=int, default=1800)
    parser.add_argument("--decoder-batch-size", type=int, default=8, help="pictures a step")
    parser.add_argument("--decoder-steps", type=int, default=1200)
    parser.add_argument("--questions", type=int, default=2000, help="how many to evaluate on")
    return parser.parse_args()


if __name__ == "__main__":
    main()
