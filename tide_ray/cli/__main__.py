"""``python -m tide_ray.cli`` is ``tide-ray``."""

from tide_ray.cli import main

main()
