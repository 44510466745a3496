"""Begins the programs that the daemon runs for us: ``python begin.py START.json MODULE ARGUMENT``.

A script and not ``-m``: this package need not be on the path that the interpreter itself makes. START.json holds the
module path of the Ray worker, so that what the user's class imports is found exactly as it is there; this file's own
directory is not on that path.
"""

import importlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:] = json.loads(Path(sys.argv[1]).read_text())["sys_path"]
    importlib.import_module(sys.argv[2]).main(sys.argv[3])
