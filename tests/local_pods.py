"""Runs the pods of a rendered Job as processes of this machine, as a kubelet would.

Each pod has a root file system of its own that cannot be written to, the volumes of its manifest
mounted where it says, its user, its host names, and exactly its environment, command and index. All
share one network that nobody else sees. Needs root and the tools of util-linux.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

KEPT = ("bin", "lib", "lib32", "lib64", "sbin", "usr", "opt", "sys", "proc", "dev")


def missing() -> str | None:
    """Why pods cannot run here."""
    if os.geteuid() != 0:
        return "pods of our own need root"
    for tool in ("unshare", "nsenter", "chroot", "mount", "ip", "hostname"):
        if shutil.which(tool) is None:
            return f"pods of our own need {tool}"
    tried = subprocess.run(["unshare", "-mun", "true"], capture_output=True)
    return "namespaces are not allowed here" if tried.returncode else None


@dataclass
class Pod:
    """A pod of a Job that runs."""

    index: int
    process: subprocess.Popen
    log: Path

    def end(self, seconds: float) -> int | None:
        """Its exit code; None if it goes on for so long."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None


@dataclass
class Cluster:
    """One network, and the folders that claims and volumes of the pods are."""

    home: Path
    claims: dict[str, Path]
    image_environment: dict[str, str]
    network_pid: int
    pods: list[Pod] = field(default_factory=list)

    def start(self, objects: list[dict], index: int) -> Pod:
        """Pod `index` of the Job among `objects`, anew."""
        job = next(each for each in objects if each["kind"] == "Job")
        configs = {e["metadata"]["name"]: e["data"] for e in objects if e["kind"] == "ConfigMap"}
        name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        place = self.home / f"{name}-{index}-{len(self.pods)}"
        place.mkdir()
        user = pod["securityContext"]["runAsUser"]
        sources = {v["name"]: self.volume(v, configs, place, user) for v in pod["volumes"]}
        environment = self.image_environment | {"JOB_COMPLETION_INDEX": str(index)}
        for entry in container["env"]:
            value = entry.get("value", f"host-{index}")  # the only field asked for: its node
            environment[entry["name"]] = expand(value, environment)
        words = [expand(word, environment) for word in container["command"] + container["args"]]
        count = job["spec"]["completions"]
        hosts = [
            f"127.0.0.1 {name}-{each}.{pod['subdomain']} {name}-{each}" for each in range(count)
        ]
        (place / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(hosts) + "\n")
        mounts = [
            (sources[mount["name"]], mount["mountPath"], mount.get("readOnly", False))
            for mount in container["volumeMounts"]
        ]
        script = f"hostname {shlex.quote(f'{name}-{index}')}\n{root_script(place, mounts)}"
        script += shlex.join(
            [
                *("exec", "chroot", f"--userspec={user}:{user}", str(place / "root")),
                *("env", "-i", *(f"{key}={value}" for key, value in environment.items())),
                *("sh", "-c", 'cd "$0" && exec "$@"', container["workingDir"], *words),
            ]
        )
        log = place / "log"
        entered = [
            "nsenter",
            f"--net=/proc/{self.network_pid}/ns/net",
            "unshare",
            "-mu",
            "sh",
            "-c",
        ]
        with log.open("w") as file:
            process = subprocess.Popen([*entered, script], stdout=file, stderr=file)
        self.pods.append(Pod(index, process, log))
        return self.pods[-1]

    def volume(self, volume: dict, configs: dict, place: Path, user: int) -> Path:
        """The folder of this machine that a volume is."""
        if "persistentVolumeClaim" in volume:
            return self.claims[volume["persistentVolumeClaim"]["claimName"]]
        folder = place / volume["name"]
        folder.mkdir()
        if "configMap" in volume:
            for file, text in configs[volume["configMap"]["name"]].items():
                (folder / file).write_text(text)
        else:
            assert "emptyDir" in volume, volume
            os.chown(folder, user, user)
        return folder


@contextmanager
def local_cluster(
    home: Path, claims: dict[str, Path], image_environment: dict[str, str]
) -> Iterator[Cluster]:
    """A cluster whose pods all end with it."""
    code = "import sys; print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        ["unshare", "-n", sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    network = f"--net=/proc/{holder.pid}/ns/net"
    subprocess.run(["nsenter", network, "ip", "link", "set", "lo", "up"], check=True)
    cluster = Cluster(home, claims, image_environment, holder.pid)
    try:
        yield cluster
    finally:
        for pod in cluster.pods:
            if pod.process.poll() is None:
                pod.process.kill()
                pod.process.wait()
        holder.communicate()


def expand(text: str, environment: dict[str, str]) -> str:
    """`$(NAME)` and `$$` as Kubernetes replaces them."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda found: "$" if found[0] == "$$" else environment.get(found[1], found[0]),
        text,
    )


def root_script(place: Path, mounts: list[tuple[Path, str, bool]]) -> str:
    """Shell that builds a pod's root from this machine's programs and the pod's volumes."""
    root = place / "root"
    root.mkdir()
    programs = {Path(sys.prefix).resolve().parent, Path(sys.base_prefix).resolve()}
    programs |= {Path(__file__).resolve().parent.parent}
    lines = [
        "set -e",
        "mount --make-rprivate /",
        f"mount -t tmpfs none {shlex.quote(str(root))}",
        f"cp -a /etc {shlex.quote(f'{root}/etc')}",
        f"cp {shlex.quote(str(place / 'hosts'))} {shlex.quote(f'{root}/etc/hosts')}",
    ]
    for entry in (Path("/", name) for name in KEPT):
        inside = f"{root}{entry}"
        if entry.is_symlink():
            lines.append(shlex.join(["ln", "-s", os.readlink(entry), inside]))
        elif entry.is_dir():
            lines.append(bind(entry, inside, "--rbind"))
    lines += [bind(folder, f"{root}{folder}") for folder in sorted(programs) if not within(folder)]
    for source, path, read_only in mounts:
        lines.append(bind(source, f"{root}{path}"))
        if read_only:
            lines.append(shlex.join(["mount", "-o", "remount,bind,ro", f"{root}{path}"]))
    lines.append(shlex.join(["mount", "-o", "remount,ro", str(root)]))
    return "\n".join(lines) + "\n"


def within(folder: Path) -> bool:
    """Whether a folder is there already, with one that every root has."""
    return any(folder.is_relative_to(Path("/", name)) for name in KEPT)


def bind(source: Path, target: str, how: str = "--bind") -> str:
    quoted = shlex.quote(target)
    return f"mkdir -p {quoted}\nmount {how} {shlex.quote(str(source))} {quoted}"
