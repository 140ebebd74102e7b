"""The commands of ``research-env``: a file and a data class for each.

Their fields are the flags, and their docstrings the help.
"""
