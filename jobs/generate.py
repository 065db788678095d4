"""Entry point for ``ray job submit -- python jobs/generate.py [flags of tide-ray generate]``.

Runs on the cluster it was submitted to; see ``--help`` for the flags.
"""

from __future__ import annotations

import sys

from tide_ray.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
