"""The manifests under cluster/ that serve as references: `python -m cluster.reference_manifests`
writes them anew."""

from importlib.metadata import version
from pathlib import Path

from cluster.launch import training_job
from cluster.profile import load_profile
from cluster.render import OBJECTS, render
from cluster.slurm_shell import SCRIPT
from data_pipeline.printable import say
from t2v.plan.plan import plan
from t2v.recipe.recipe import load_config

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "t2v_64x288x512"
NODES = 32


def reference_manifests() -> dict[str, str]:
    """The fine-tuning of the 3.9 B model on 32 nodes, for every kind of cluster: path and text."""
    config = load_config(ROOT / f"configs/{RECIPE}.yaml")
    site = load_profile(ROOT / "configs/cluster/slurm.yaml")
    forecast = plan(config, gpus=NODES * site.ranks_per_node, gpu_memory_gib=site.rank_memory_gib)
    manifests = {}
    for path, profile in (
        (f"slurm/{RECIPE}.sbatch", site),
        *(
            (f"kubernetes/{RECIPE}-{flavour}.yaml", cloud.model_copy(update={"flavour": flavour}))
            for cloud in [load_profile(ROOT / "configs/cluster/kubernetes.yaml")]
            for flavour in ("jobset", "trainjob", "job")
        ),
    ):
        job = training_job(config, profile, forecast, nodes=NODES, code=version("t2v"))
        files = render(job, profile)
        manifests[path] = files.get(SCRIPT) or files[OBJECTS]
    return manifests


def main() -> None:
    for path, text in reference_manifests().items():
        target = ROOT / "cluster" / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8")
        say(f"{target.relative_to(ROOT)}: written.")


if __name__ == "__main__":
    main()
