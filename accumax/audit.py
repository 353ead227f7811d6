"""The command line of `accumax.audit`: `python -m accumax.audit --help`."""

if __name__ != "__main__":
    # As a module it would take the place of the function in the package.
    raise ImportError(
        "accumax.audit is a function: `from accumax import audit`. From a shell: "
        "`python -m accumax.audit module:make_step`."
    )

from ._compiled.command import audit_command

audit_command()
