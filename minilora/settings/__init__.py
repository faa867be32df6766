"""Settings: what a person types or writes into a file, and how it becomes a configuration.

flags             train.py's flags, one dataclass field each    flags_evaluate    evaluate.py's
values            one value of one flag, read and checked
parse             command line, TOML files and recipes -> Config; config.toml of a run
exit_codes        one line instead of a traceback
recipes/          named sets of flags, as TOML
"""
