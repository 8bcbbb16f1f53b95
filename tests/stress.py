"""Runs the tests of several processes again and again while all cores are busy; stops at the first that fails.

python -m tests.stress [rounds]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time


def main(rounds: int) -> int:
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        for turn in range(1, rounds + 1):
            start = time.monotonic()
            command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_distributed.py"]
            run = subprocess.run(command, capture_output=True, text=True)
            print(f"{turn} of {rounds}: {run.stdout.splitlines()[-1]}, {time.monotonic() - start:.0f} s", flush=True)
            if run.returncode:
                print(run.stdout, run.stderr)
                return run.returncode
        return 0
    finally:
        for process in load:
            process.kill()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 50))
