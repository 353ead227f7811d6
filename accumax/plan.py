"""The command line of `accumax.plan`: `python -m accumax.plan --help`."""

if __name__ != "__main__":
    # As a module it would take the place of the function in the package.
    raise ImportError(
        "accumax.plan is a function: `from accumax import plan`. From a shell: "
        "`python -m accumax.plan module:make_step --batch-size 1024 --memory 16GiB`."
    )

from ._compiled.command import plan_command

plan_command()
