"""The command line of `accumax.audit`: `python -m accumax.audit module:step`."""

from ._compiled.command import audit_command

if __name__ == "__main__":
    audit_command()
else:  # a module of this name would take the place of the function
    raise ImportError(
        "accumax.audit is a function: write `from accumax import audit`. Its command "
        "line is `python -m accumax.audit`."
    )
