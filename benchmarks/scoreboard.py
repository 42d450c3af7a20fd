"""`python -m benchmarks.scoreboard`, short for `python -m benchmarks scoreboard`."""

import sys

from benchmarks.studies import app

if __name__ == "__main__":
    app(["scoreboard", *sys.argv[1:]], prog_name="python -m benchmarks")
