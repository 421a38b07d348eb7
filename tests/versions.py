"""The oldest and the newest supported version of each runtime, each in an environment of its own: `make versions`.

Each installs this package with the oldest versions that pyproject.toml allows, or with those of the lock file, hashes
required, and runs a bundle's golden frames on every artifact that it can.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
PYTHONS = ("python3.11", "python3.12", "python3.13")
RUNTIMES = ("onnxruntime", "openvino")
TORCH = "pytorch"  # a gigabyte and more, and on x86 with CUDA's libraries: only if it is asked for


def locked() -> list[str]:
    """The extra sets, but for the one whose packages are in NVIDIA's own index."""
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return [extra for extra in extras if extra != "torch-tensorrt"]


def oldest(extra: str) -> list[str]:
    """The lower bounds of the package's requirements and of an extra set's, as pins."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"][extra]]
    return [each.split(",")[0].replace(">=", "==") for each in listed]


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd="/", check=False)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1][:200])
    return done.stdout


def check(python: str, extra: str, which: str, folder: Path, bundle: Path) -> str:
    """Installs, runs the golden frames and returns what ran. Raises RuntimeError."""
    wanted = oldest(extra) if which == "oldest" else [(CHECKOUT / "locks" / f"{extra}.txt").read_text()]
    key = hashlib.sha256("".join(wanted).encode()).hexdigest()[:8]  # with other versions it is made anew
    environment = folder / f"{extra}-{which}-{python}-{key}"
    pip = (environment / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if not (environment / "done").exists():
        shutil.rmtree(environment, ignore_errors=True)
        run(python, "-m", "venv", environment)
        if which == "oldest":
            run(*pip, *wanted)
        else:
            run(*pip, "--require-hashes", "-r", CHECKOUT / "locks" / f"{extra}.txt")
        (environment / "done").touch()
    run(*pip, "--no-deps", "--force-reinstall", CHECKOUT)
    lines = run(environment / "bin/msa2net", "verify", bundle).splitlines()
    passed = [" ".join(line.split()[:2]) for line in lines if line.startswith(extra) and "not run" not in line]
    if not passed:
        raise RuntimeError(f"no artifact ran: {lines}")
    library = "torch" if extra == TORCH else extra
    code = f"import numpy, {library} as library; print(library.__version__.split('-')[0], 'numpy', numpy.__version__)"
    return f"{library} {run(environment / 'bin/python', '-c', code).strip()}: {', '.join(passed)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--folder", type=Path, help="for the environments, which are kept")
    parser.add_argument("--list", action="store_true", help="only print the extra sets that have a lock file")
    parser.add_argument("--torch", action="store_true", help="PyTorch, too: gigabytes")
    arguments = parser.parse_args()
    if arguments.list:
        print(*locked())
        return 0
    folder, failed, ran = arguments.folder.resolve(), 0, 0
    for extra in (*RUNTIMES, *([TORCH] if arguments.torch else [])):
        rows = [(PYTHONS[0], "oldest"), *((python, "newest") for python in PYTHONS)]
        for python, which in rows:
            if not shutil.which(python):
                print(f"{extra:<12} {which}  {python}  not run: it is not installed")
                continue
            start, ran = time.monotonic(), ran + 1
            try:
                said = check(python, extra, which, folder, arguments.bundle.resolve())
            except RuntimeError as error:
                failed, said = failed + 1, f"FAIL: {error}"
            print(f"{extra:<12} {which}  {python}  {time.monotonic() - start:4.0f} s  {said}", flush=True)
    return bool(failed or not ran)


if __name__ == "__main__":
    sys.exit(main())
