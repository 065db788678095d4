"""Entry point for ``ray job submit -- python jobs/calibrate.py [flags of tide-ray calibrate]``; see ``--help``.

One model is calibrated in this process; several, or a sweep in a YAML file, as tasks on the cluster.
"""

from __future__ import annotations

import sys

from tide_ray.cli import main

if __name__ == "__main__":
    main(["calibrate", *sys.argv[1:]])
