"""Settings: what a person types or writes into a file, and how it becomes a configuration.

flags, flags_evaluate    one dataclass field per flag            values     one value of one flag, read and checked
parse                    command line, recipes, TOML             recipes/   named sets of flags
checks_evaluate          which flags of evaluate.py go together  exit_codes one line instead of a traceback
"""
