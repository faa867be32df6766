"""Formats: the adapter files of other libraries.

peft      adapter_config.json as PEFT writes and reads it        foreign   adapters under the names of other libraries
"""
