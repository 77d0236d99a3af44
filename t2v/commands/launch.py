"""The verbs that hand jobs to a scheduler: one thin function each."""

import argparse
from pathlib import Path

from data_pipeline.printable import plain
from t2v.commands.data import add_data_verbs
from t2v.commands.parser import add_config, add_verb, count, plain_name, positive

GPU_VERBS = ("embed", "encode")
DATA_VERBS = ("build", "score", *GPU_VERBS)


def launch(options: argparse.Namespace) -> None:
    from cluster.launch import prepare_chain, prepare_run, write_out
    from cluster.submit import submit
    from t2v.plan.plan import print_plan

    prepared = prepare_run(
        options.config,
        options.overrides,
        options.cluster,
        nodes=options.nodes,
        avoid=options.avoid,
    )
    chain = prepare_chain(prepared, options.then, options.cluster, nodes=options.nodes)
    for stage in chain:
        if stage.plan is not None:
            print_plan(stage.plan)
    if options.submit:
        print(plain("\n".join(submit(chain))))
        return
    for number, stage in enumerate(chain):
        out = Path(options.out)
        folder = out if len(chain) == 1 else out / f"{number}-{stage.job.name}"
        print(plain("\n".join(write_out(stage, folder))))


def launch_data(options: argparse.Namespace) -> None:
    from cluster.launch import prepare_data, write_out
    from cluster.submit import submit

    verb = refuse_wrong_arguments(options.arguments, options.usage)
    gpus = options.gpus if options.gpus is not None else int(verb in GPU_VERBS)
    prepared = prepare_data(
        options.arguments,
        options.cluster,
        name=options.name or f"data-{verb}",
        tasks=options.tasks,
        at_once=options.at_once or options.tasks,
        cpus=options.cpus,
        memory_gib=options.memory_gib,
        gpus=gpus,
    )
    say = submit([prepared]) if options.submit else write_out(prepared, Path(options.out))
    print(plain("\n".join(say)))


def refuse_wrong_arguments(arguments: list[str], usage) -> str:
    """The verb of a data job whose arguments `t2v data` takes; each task adds its own `--task`."""
    if arguments[:1] == ["--"]:
        del arguments[0]
    if not arguments or arguments[0] not in DATA_VERBS:
        usage(f"after --, give one of {', '.join(DATA_VERBS)} with its arguments")
    if any(argument.partition("=")[0] == "--task" for argument in arguments):
        usage("--task is each task's own; leave it out")
    parser = argparse.ArgumentParser(prog="t2v")
    add_data_verbs(parser.add_subparsers(required=True))
    parser.parse_args(["data", *arguments])
    return arguments[0]


def add_launch_verbs(verbs) -> None:
    """All verbs that hand jobs to a scheduler."""
    verb = add_verb(verbs, "launch", launch, "a training job for SLURM or Kubernetes",
                    "t2v launch configs/t2v_64x288x512.yaml total_steps=20000"
                    " --cluster configs/cluster/slurm.yaml --nodes 32 --submit")  # fmt: skip
    add_config(verb)
    verb.add_argument("--nodes", type=int, help="by default as many as the profile has")
    verb.add_argument("--then", action="append", default=[], metavar="STAGE",
                      help="after it ends well: 'RECIPE [key=value ...]', warm-started from the run"
                      " before, or evaluate:PROTOCOL of that run")  # fmt: skip
    verb.add_argument("--avoid", type=plain_name, nargs="+", default=[], metavar="NODE",
                      help="besides those in the run's bad_nodes")  # fmt: skip
    _add_where(verb)

    verb = add_verb(verbs, "launch-data", launch_data, "build, score, embed or encode in parallel",
                    "t2v launch-data --cluster configs/cluster/slurm.yaml --tasks 64 --submit --"
                    " build my_clips data/videos --size 64x288x512")  # fmt: skip
    _add_where(verb)
    verb.add_argument("--tasks", type=positive, required=True, help="parts the work is split in")
    verb.add_argument("--at-once", type=positive, help="tasks that run together; all by default")
    verb.add_argument("--cpus", type=positive, default=8, help="of each task")
    verb.add_argument("--memory-gib", type=positive, default=32, help="of each task")
    verb.add_argument("--gpus", type=count, metavar="N",
                      help="of each task; by default 1 for embed and encode")  # fmt: skip
    verb.add_argument("--name", help="the job's name; data-VERB by default")
    verb.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- build|score|... ...",
                      help="the arguments of t2v data")  # fmt: skip
    verb.set_defaults(usage=verb.error)


def _add_where(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--cluster", required=True, metavar="PROFILE",
                      help="a site, such as configs/cluster/slurm.yaml")  # fmt: skip
    where = verb.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", metavar="DIR", help="only write the job's files")
    where.add_argument("--submit", action="store_true", help="hand the job to the scheduler")
