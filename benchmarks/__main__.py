"""Entry point of `python -m benchmarks`."""

import sys


def accelerator() -> None:
    """Cost and worth of steps on an accelerator, with jax, flax and optax alone."""
    from benchmarks.studies.accelerator import main

    main(sys.argv[2:])


if __name__ == "__main__":
    if sys.argv[1:2] == ["accelerator"]:  # It does without what the others import.
        accelerator()
    else:
        from benchmarks.studies import app

        app.command("accelerator")(accelerator)
        app(prog_name="python -m benchmarks")
