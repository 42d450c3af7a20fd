"""Entry point of `python -m benchmarks`."""

from benchmarks.studies import app

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
