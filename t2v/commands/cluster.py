"""The verbs of jobs on a cluster: one thin function each."""

import argparse
import json
import os
import sys
from pathlib import Path

from data_pipeline.errors import ConfigError
from t2v.commands.parser import add_config, add_verb, count, positive, seconds


def node(options: argparse.Namespace) -> int:
    from cluster.node import NodeJob, run_node

    refuse_strange_rank(options)
    return run_node(
        NodeJob(
            run_dir=Path(options.run_dir),
            train_arguments=(options.config, *options.overrides),
            nnodes=options.nnodes,
            nproc_per_node=options.nproc_per_node,
            rdzv_endpoint=options.rdzv_endpoint,
            rdzv_id=options.rdzv_id,
            node_rank=options.node_rank,
            is_host=options.is_host,
            grace_seconds=options.grace_seconds,
            rendezvous_timeout_seconds=options.rendezvous_timeout_seconds,
        )
    )


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
    from cluster.node import split_endpoint
    from t2v.recipe.recipe import accumulation_steps, load_config

    config = load_config(options.config, options.overrides)
    ranks = options.nproc_per_node
    accumulation_steps(config, ranks * options.nnodes)  # which ranks must divide the batch for
    if options.nnodes == 1:
        report, judgement = flight.check_alone(config, ranks=ranks)
        reports = [report]
    else:
        host, port = split_endpoint(options.rdzv_endpoint)
        meeting = flight.Meeting(
            options.nnodes, options.node_rank, host, port, options.timeout_seconds
        )
        reports, judgement = flight.check_together(config, meeting, ranks=ranks)
    code = flight.own_exit_code(judgement, flight.node_name())
    if options.node_rank == 0:
        print(flight.to_json(reports, judgement)) if options.json else flight.print_reports(
            reports, judgement
        )
    elif code:
        print("\n".join(judgement.problems), file=sys.stderr)
    return code


def status(options: argparse.Namespace) -> None:
    from cluster.status import print_status, run_status, to_json

    found = run_status(Path(options.run_dir))
    if options.decide:
        print(found.decision)
    elif options.json:
        print(to_json(found))
    else:
        print_status(found)


def health(options: argparse.Namespace) -> None:
    from cluster.heartbeat import check_health, heartbeat_file

    found = check_health(heartbeat_file(), max_age_seconds=options.max_age, startup=options.startup)
    json.dump(found, sys.stdout)
    print()


def add_cluster_verbs(verbs) -> None:
    """All verbs of jobs on a cluster."""
    verb = add_verb(verbs, "node", node, "run this node's part of a job, as a scheduler starts it",
                    "t2v node --nnodes 2 --nproc-per-node 8 --rdzv-endpoint node1:29400"
                    " --rdzv-id 17-0 --is-host --run-dir runs/base_36x64"
                    " -- configs/base_36x64.yaml")  # fmt: skip
    verb.add_argument("--nnodes", type=positive, default=1, help="nodes of the job")
    verb.add_argument("--nproc-per-node", type=positive, default=1, help="ranks here: one per GPU")
    verb.add_argument("--rdzv-endpoint", default="localhost:29400", help="HOST:PORT to meet at")
    verb.add_argument("--rdzv-id", default="t2v", help="differs from attempt to attempt")
    verb.add_argument("--node-rank", type=count, default=0, help="this node's number, for its logs")
    verb.add_argument("--is-host", action="store_true", help="the nodes meet at this one")
    verb.add_argument(
        "--run-dir",
        required=True,
        help="the run folder, shared by all nodes; the recipe's run_dir gives way to it",
    )
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
    verb.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_config(verb)

    verb = add_verb(verbs, "status", status, "how a run is, from its shared folder alone",
                    "t2v status runs/base_36x64")  # fmt: skip
    verb.add_argument("run_dir")
    answer = verb.add_mutually_exclusive_group()
    answer.add_argument("--json", action="store_true", help="print JSON instead of a table")
    answer.add_argument(
        "--decide", action="store_true", help="what a scheduler should do: done, requeue or stop"
    )

    verb = add_verb(verbs, "health", health, "whether this node's wrapper lives; for probes",
                    "t2v health --max-age 900")  # fmt: skip
    verb.add_argument("--max-age", type=seconds, default=900.0, help="seconds since the last sign")
    verb.add_argument("--startup", action="store_true", help="fail until training has begun")
