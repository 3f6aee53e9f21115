"""Runs the reproductions, two at a time, and writes docs/reproduced.md from all results that there are.

    python tools/reproduce/all.py [NAMES] [--jobs 2] [--minutes 20] [--missing] [--resume] [--page]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from frame import RESULTS, ROOT, write_page

FOLDER = Path(__file__).parent
RUNS = "\n    main(REPRODUCTION)\n"  # how a script ends, and no file that stands beside them


def scripts() -> list[str]:
    """Name the scripts of this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.read_text().endswith(RUNS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAMES", help=", ".join(scripts()))
    parser.add_argument("--jobs", type=int, default=2, help="scripts that run at a time, each on one thread")
    parser.add_argument("--minutes", type=float, default=20, help="after which a script is ended")
    parser.add_argument("--missing", action="store_true", help="only those without a result")
    parser.add_argument("--resume", action="store_true", help="take what seeds gave before, if a script is the same")
    parser.add_argument("--page", action="store_true", help="run nothing, only write the page")
    arguments = parser.parse_args()
    names = arguments.names or scripts()
    if unknown := set(names) - set(scripts()):
        parser.error(f"no script is called {', '.join(sorted(unknown))}: there are {', '.join(scripts())}")
    if arguments.missing:
        names = [name for name in names if not (RESULTS / f"{name}.json").exists()]
    failed = []
    if not arguments.page:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            ended_well = pool.map(lambda name: _run(name, arguments.resume, 60 * arguments.minutes), names)
            failed = [name for name, well in zip(names, ended_well, strict=True) if not well]
    write_page(scripts=scripts())
    if failed:
        sys.exit(f"did not end well: {', '.join(failed)}")


def _run(name: str, resume: bool, seconds: float) -> bool:
    """Run a script on one thread, and say whether it came to a result, be it pass or short."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    try:
        ran = subprocess.run([sys.executable, FOLDER / f"{name}.py", *["--resume"] * resume], env=environment,
                             capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"{name}: ended after {seconds:.0f} s", flush=True)
        return False
    print(ran.stdout if ran.returncode == 0 else f"{name}: {ran.stdout}{ran.stderr[-3000:]}", flush=True)
    return ran.returncode == 0


if __name__ == "__main__":
    main()
