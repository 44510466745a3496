"""The command line: one module for each group of commands, loaded when such a command is called.

``main.py`` has the table of commands and turns errors into exit codes; ``output.py`` prints. See docs/cli.md.
"""
