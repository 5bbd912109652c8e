"""python -m qvl.recipes.quickstart: runs the story, in a process of its own for each rank."""

import sys

import tyro

from qvl.recipes.quickstart.run import Options, start

if __name__ == "__main__":
    sys.exit(start(tyro.cli(Options, prog="python -m qvl.recipes.quickstart")))
