"""How the programs of scripts/ print their --help."""

import argparse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written, and the default of each flag that has one."""

    def _get_help_string(self, action):
        """A flag's help; None, off, and what argparse itself adds are no defaults worth a word."""
        default = action.default
        if default in (None, argparse.SUPPRESS) or default is False or default == []:
            return action.help
        words = default if isinstance(default, (list, tuple)) else [default]
        return f"{action.help} (default: {' '.join(map(str, words))})"
