"""The verbs of jobs on a cluster: one thin function each."""

import argparse
import json
import os
import socket
import sys
from pathlib import Path

from cluster.driver import Promise
from data_pipeline.errors import ConfigError
from data_pipeline.printable import plain
from t2v.commands.parser import add_config, add_verb, count, plain_name, positive, seconds

# A requeued job waits as long by SLURM's own rule.
SCHEDULER_SECONDS = 120.0


def node(options: argparse.Namespace) -> int:
    from cluster.node import NodeJob, run_node

    refuse_strange_rank(options)
    if options.gpus:
        os.environ["T2V_GPUS"] = str(options.gpus)
    alone = f"{socket.gethostname()}-{os.getpid()}"
    return run_node(
        NodeJob(
            run_dir=Path(options.run_dir),
            train_arguments=(options.config, *options.overrides),
            preflight=promise_of(options).words if options.preflight else None,
            on_end=options.on_end,
            nnodes=options.nnodes,
            nproc_per_node=options.nproc_per_node,
            rdzv_endpoint=options.rdzv_endpoint,
            # Nodes that meet must agree on a name for this attempt, a node alone takes its own.
            rdzv_id=options.rdzv_id or ("t2v" if options.nnodes > 1 else alone),
            node_rank=options.node_rank,
            grace_seconds=options.grace_seconds,
            rendezvous_timeout_seconds=options.rendezvous_timeout_seconds,
        )
    )


def add_promise(verb: argparse.ArgumentParser) -> None:
    """What the site promised of each node; ranks that find no GPU end with 69."""
    verb.add_argument("--gpus", type=count, help="that the site promised of each node")
    verb.add_argument("--gpu-model", help="part of the name that their driver shows, as H100")
    verb.add_argument("--gpu-memory-gib", type=seconds, help="of each GPU, at least")
    verb.add_argument("--gpu-driver", help="the oldest version of their driver, as 550")


def promise_of(options: argparse.Namespace) -> Promise:
    """What the site promised of each node."""
    return Promise(options.gpus, options.gpu_model, options.gpu_memory_gib, options.gpu_driver)


def refuse_strange_rank(options: argparse.Namespace) -> None:
    """ConfigError for a node that the job does not have."""
    if not 0 <= options.node_rank < options.nnodes:
        raise ConfigError(
            f"--node-rank: {options.node_rank} is wrong because --nnodes is {options.nnodes}; give "
            f"0 to {options.nnodes - 1}."
        )


def preflight(options: argparse.Namespace) -> int:
    # Before torch is imported: its C++ tells pages of frames of what is one line here.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    refuse_strange_rank(options)
    from cluster import preflight as flight
    from cluster.bad_nodes import node_name, note_bad_nodes
    from cluster.judgement import own_exit_code
    from cluster.rendezvous import Meeting
    from t2v.recipe.recipe import accumulation_steps, load_config

    config = load_config(options.config, options.overrides)
    ranks = options.nproc_per_node
    accumulation_steps(config, ranks * options.nnodes)  # which ranks must divide the batch for
    promise = promise_of(options)
    if options.gpus:
        os.environ["T2V_GPUS"] = str(options.gpus)  # ranks that try the fabric must have them
    is_first = options.node_rank == 0
    if options.nnodes == 1:
        report, judgement = flight.check_alone(config, ranks=ranks, promise=promise)
        reports = [report]
    else:
        meeting = Meeting(
            nnodes=options.nnodes,
            nproc_per_node=ranks,
            rdzv_endpoint=options.rdzv_endpoint,
            rdzv_id="preflight",
            node_rank=options.node_rank,
            rendezvous_timeout_seconds=options.timeout_seconds,
        )
        recipe = (options.config, *options.overrides)
        reports, judgement = flight.check_together(config, meeting, recipe=recipe, promise=promise)
    speaks = options.node_rank == judgement.judge
    code = own_exit_code(judgement, node_name(), speaks=speaks)
    if speaks:
        note_bad_nodes(judgement.bad_nodes)
    if is_first:
        print(flight.to_json(reports, judgement)) if options.json else flight.print_reports(
            reports, judgement
        )
    elif code:
        print(plain("\n".join(judgement.problems)), file=sys.stderr)
    return code


def status(options: argparse.Namespace) -> None:
    from cluster.status_view import print_statuses, statuses, to_json, watch

    folders = [Path(folder) for folder in options.run_dir]
    if options.watch is not None:
        watch(folders, every_seconds=max(options.watch, 1.0))
        return
    all_found = statuses(folders)
    found = all_found[0]
    if options.decide:
        if len(folders) > 1:
            raise ConfigError("--decide: is about one run; give one run folder.")
        wait = f" {found.pause_seconds:.0f}" if found.pause_seconds > SCHEDULER_SECONDS else ""
        print(found.decision + (wait if found.decision == "requeue" else ""))
    elif options.json:
        print("\n".join(map(to_json, all_found)))
    else:
        print_statuses(all_found)


def health(options: argparse.Namespace) -> None:
    from cluster.heartbeat import check_health, heartbeat_file

    found = check_health(heartbeat_file(), max_age_seconds=options.max_age, startup=options.startup)
    json.dump(found, sys.stdout)
    print()


def add_cluster_verbs(verbs) -> None:
    """All verbs of jobs on a cluster."""
    verb = add_verb(verbs, "node", node, "run this node's part of a job, as a scheduler starts it",
                    "t2v node --nnodes 2 --nproc-per-node 8 --rdzv-endpoint node1:29400"
                    " --rdzv-id 17-0 --node-rank 0 --run-dir runs/base_36x64"
                    " -- configs/base_36x64.yaml")  # fmt: skip
    verb.add_argument("--nnodes", type=positive, default=1, help="nodes of the job")
    verb.add_argument("--nproc-per-node", type=positive, default=1, help="ranks here: one per GPU")
    verb.add_argument("--rdzv-endpoint", default="localhost:29400", help="HOST:PORT to meet at")
    verb.add_argument("--rdzv-id", type=plain_name, help="differs from attempt to attempt")
    verb.add_argument("--node-rank", type=count, default=0, help="this node's number, for its logs")
    verb.add_argument(
        "--run-dir",
        required=True,
        help="the run folder, shared by all nodes; the recipe's run_dir gives way to it",
    )
    verb.add_argument("--preflight", action="store_true", help="nodes check each other first")
    verb.add_argument("--on-end", metavar="PROGRAM", help="run by the first node at the end")
    add_promise(verb)
    verb.add_argument("--grace-seconds", type=seconds, default=600.0,
                      help="from a request to stop to the end of all ranks")  # fmt: skip
    verb.add_argument("--rendezvous-timeout-seconds", type=seconds, default=600.0,
                      help="how long nodes wait for each other")  # fmt: skip
    add_config(verb)

    verb = add_verb(verbs, "preflight", preflight, "check this node, or all of a job, before a run",
                    "t2v preflight configs/base_36x64.yaml --nproc-per-node 8")  # fmt: skip
    verb.add_argument("--nnodes", type=positive, default=1, help="nodes that check each other")
    verb.add_argument("--node-rank", type=count, default=0, help="this node's number")
    verb.add_argument("--nproc-per-node", type=positive, default=1, help="ranks here: one per GPU")
    verb.add_argument("--rdzv-endpoint", default="localhost:29401", help="HOST:PORT to meet at")
    verb.add_argument("--timeout-seconds", type=seconds, default=120.0,
                      help="how long nodes wait for each other")  # fmt: skip
    add_promise(verb)
    verb.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_config(verb)

    verb = add_verb(verbs, "status", status, "how runs are, from their shared folders alone",
                    "t2v status runs/base_36x64")  # fmt: skip
    verb.add_argument("run_dir", nargs="+", help="a run folder, or many, as runs/*")
    answer = verb.add_mutually_exclusive_group()
    answer.add_argument("--json", action="store_true", help="JSON, a line for each run")
    answer.add_argument("--watch", type=seconds, nargs="?", const=5.0, metavar="SECONDS",
                        help="show it anew every so often, until no run goes on")  # fmt: skip
    answer.add_argument(
        "--decide", action="store_true", help="what a scheduler should do: done, requeue or stop"
    )

    verb = add_verb(verbs, "health", health, "whether this node's wrapper lives; for probes",
                    "t2v health --max-age 900")  # fmt: skip
    verb.add_argument("--max-age", type=seconds, default=900.0, help="seconds since the last sign")
    verb.add_argument("--startup", action="store_true", help="fail until training has begun")
