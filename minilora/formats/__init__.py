"""Formats: adapter files as PEFT and other libraries write them.

peft      adapter_config.json as PEFT writes and reads it
checks    whether a file fits a model, tensor by tensor
foreign   adapters under the names of other libraries
"""
