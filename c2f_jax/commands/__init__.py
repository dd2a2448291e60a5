"""The commands of ``c2f``, one file each.

A command is a module with four names: ``SUMMARY``, one line of help; ``EXAMPLES``, command lines
to copy; ``add_arguments``, which fills an argparse parser; and ``run``, which does the work and
returns the exit status. Each module imports what it needs inside ``run``, so that ``c2f --help``
is fast.
"""
