"""Converters: one module a format, each of which describes what is to be written and lets `core.convert` write it.

A converter is a class with three class attributes, `format_name`, `summary` (one line) and `expects` (the tree it
reads), and a method `plan(...)` that returns a `core.ConversionPlan`. It is found by its entry point in the group
``diffseg_nnunet.converters``, so that another package can add its own.
"""
