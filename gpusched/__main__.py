"""``python -m gpusched``: the command line."""

from __future__ import annotations

from gpusched.cli.main import main

if __name__ == "__main__":
    main()
