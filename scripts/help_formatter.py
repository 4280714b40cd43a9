"""How the programs of scripts/ read their command line and print their --help."""

import argparse
import os
import re
import sys
from pathlib import Path


def command_line(argv=None):
    """The words of a command; `~` is the home folder where no shell replaced it too, as after =."""
    words = sys.argv[1:] if argv is None else argv
    home = os.path.expanduser("~").replace("\\", r"\\")
    return [re.sub(r"^(--\w+=)?~(?=/|$)", rf"\g<1>{home}", str(word)) for word in words]


def given_path(text):
    """An argparse type: "" would be the working directory, as where a variable is not set."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a file or folder")
    return Path(text)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written, and the default of each flag that has one."""

    def _get_help_string(self, action):
        """A flag's help; None, off, and what argparse itself adds are no defaults worth a word."""
        default = action.default
        if default in (None, argparse.SUPPRESS) or default is False or default == []:
            return action.help
        words = default if isinstance(default, (list, tuple)) else [default]
        return f"{action.help} (default: {' '.join(map(str, words))})"
