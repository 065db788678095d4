"""Entry point for ``ray job submit -- python jobs/report.py [flags of tide-ray report]``.

Runs where the output's folder is at hand; see ``--help`` for the flags.
"""

from __future__ import annotations

import sys

from tide_ray.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
