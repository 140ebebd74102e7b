"""The commands of ``research-env``: for each a file with a data class.

Its fields are the flags, and its docstrings the help texts.
"""
