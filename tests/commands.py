"""The command line, called in this process as it is typed."""

from mistral_eqx.apps.main import main


def run(*arguments):
    return main([str(argument) for argument in arguments])


def fails(capsys, *arguments):
    """The one line on standard error of a command that ends with an error of the user's."""
    try:
        status = run(*arguments)
    except SystemExit as error:  # argparse's
        status = error.code
    out, error = capsys.readouterr()
    assert status == 2 and out == ""
    assert error.startswith("mistral_eqx: ") and error.endswith("\n")
    assert error.count("\n") == 1
    return error
