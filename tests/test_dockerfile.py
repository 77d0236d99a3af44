"""The image is pinned, runs as nobody in particular, and is really built and trained in."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROGRAMS = ("buildah", "debootstrap")
LOCAL_FILE = re.compile(r"(?:file://)?(/[^\s'\"]+)")


def instructions(name: str) -> list[str]:
    """The arguments of all instructions of a kind."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.split(None, 1)[1] for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_the_base_is_an_argument_and_the_user_is_not_root():
    assert DOCKERFILE.index("ARG BASE_IMAGE") < DOCKERFILE.index("FROM ${BASE_IMAGE}")
    assert instructions("USER") == ["1000:1000"]
    assert instructions("ENTRYPOINT") == ['["tini", "-g", "--"]']


def test_every_python_package_is_pinned():
    runs = " ".join(instructions("RUN"))
    for command in re.findall(r"pip install [^&]*", runs):
        assert (
            "--constraint /app/requirements.lock" in command
            or "==" in command
            or ("--no-deps --no-build-isolation --no-index" in command)
        ), command


def test_no_address_of_a_registry_is_in_the_image():
    assert "index-url" not in DOCKERFILE
    assert "find-links" not in DOCKERFILE


def test_what_the_image_copies_passes_the_ignore_file():
    lines = (ROOT / ".dockerignore").read_text().split()
    copied = {name for line in instructions("COPY") for name in line.split()[:-1]}
    assert lines[0] == "*"
    assert copied == {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_build_script_is_valid_shell():
    subprocess.run(["bash", "-n", ROOT / "cluster" / "build_image.sh"], check=True)


def pip_options(folder: Path) -> list[str]:
    """This machine's pip configuration and the folders it names, for the time of the build."""
    listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=False)
    settings = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        scope, _, option = name.partition(".")
        if scope in ("global", ":env:"):
            settings[option] = value.strip("'")
    options = []
    if certificate := settings.get("cert"):
        # Not where the image's own will be installed.
        options += ["--volume", f"{certificate}:/pip-certificates.pem:ro"]
        settings["cert"] = "/pip-certificates.pem"
    configuration = folder / "pip.conf"
    lines = [f"{option} = {value}" for option, value in sorted(settings.items())]
    configuration.write_text("\n".join(["[global]", *lines]) + "\n")
    options += ["--secret", f"id=pip,src={configuration}"]
    for path in LOCAL_FILE.findall(" ".join(settings.values())):
        # A package index is a folder beside its files: both are needed.
        root = Path(path).parent if Path(path).name == "simple" else Path(path)
        if root.exists():
            options += ["--volume", f"{root}:{root}:ro"]
    return options


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(os.geteuid() != 0, reason="building by chroot needs root")
@pytest.mark.skipif(
    any(shutil.which(name) is None for name in PROGRAMS),
    reason=f"{' or '.join(PROGRAMS)} is missing; apt install {' '.join(PROGRAMS)}",
)
def test_the_image_is_built_and_trains(tmp_path):
    done = subprocess.run(
        [ROOT / "cluster" / "build_image.sh", "t2v:test", *pip_options(tmp_path)],
        env=os.environ | {"STORAGE": str(tmp_path / "storage")},
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(tmp_path / "storage", ignore_errors=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.splitlines()[-1].startswith("t2v:test: built, and trained in: sha256:")
