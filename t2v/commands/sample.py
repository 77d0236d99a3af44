"""`t2v sample`: prompts or classes to video."""

import argparse
import os
from pathlib import Path

from data_pipeline.printable import plain
from t2v.commands.parser import add_verb


def add_sample_verb(verbs) -> None:
    """The verb and its arguments."""
    verb = add_verb(verbs, "sample", sample, "prompts to video; alone or under torchrun",
                    "t2v sample runs/t2v_64x288x512 --prompt 'a panda eating bamboo' --out samples"
                    " --encoder google-t5/t5-11b")  # fmt: skip
    verb.add_argument("checkpoint", help="a run folder, a step folder, or an export")
    verb.add_argument("--prompt", action="append", help="a text prompt; may be repeated")
    verb.add_argument("--prompts", help="a file with one prompt per line")
    verb.add_argument("--negative-prompt", help="what guidance leads away from, for every clip")
    verb.add_argument("--label", action="append", type=int, help="a class; may be repeated")
    verb.add_argument("--count", type=int, help="clips of a recipe without text or classes")
    verb.add_argument(
        "--given",
        action="append",
        metavar="FILE",
        help="an image or a clip that clips begin with, or a coarse clip to refine: one for all, "
        "or one for each",
    )
    verb.add_argument("--out", required=True, help="folder for mp4, contact sheet, samples.json")
    verb.add_argument("--encoder", help="folder or hub id of the text encoder of the training set")
    verb.add_argument("--vae", help="folder or hub id of the autoencoder of its latents, if any")
    verb.add_argument("--seed", type=int, default=0, help="seed of the first clip; then one more")
    verb.add_argument(
        "--memory-gib",
        type=float,
        help="memory of each process: of its GPU, or all of its main memory on a CPU",
    )
    verb.add_argument("--scratch", help="folder for features that fit in no memory")
    verb.add_argument(
        "--levels", action="store_true", help="write the clips of coarser levels as well"
    )
    verb.add_argument("--clips-at-once", type=int, default=8, help="most clips sampled together")
    verb.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="a sampling setting, such as overlap=fhw or guidance_scale=[4,4,2,1]",
    )


def sample(options: argparse.Namespace) -> None:
    from t2v.sampling.generate import Means, sample_checkpoint
    from t2v.sampling.subjects import Request, read_prompts

    prompts = list(options.prompt or [])
    if options.prompts:
        prompts += read_prompts(Path(options.prompts))
    written = sample_checkpoint(
        options.checkpoint,
        Request(
            prompts=tuple(prompts),
            labels=tuple(options.label or []),
            count=options.count,
            negative_prompt=options.negative_prompt,
            encoder=options.encoder,
            vae=options.vae,
            seed=options.seed,
            levels=options.levels,
            given=tuple(options.given or []),
        ),
        out=options.out,
        overrides=options.set or [],
        means=Means(
            memory_gib=options.memory_gib,
            scratch=Path(options.scratch) if options.scratch else None,
            clips_at_once=options.clips_at_once,
        ),
    )
    if os.environ.get("RANK", "0") == "0":
        print(plain(f"{written}: written."))
