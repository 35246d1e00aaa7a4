"""Converters: one module a format, each of which describes what is to be written and lets `core.convert` write it.

A converter is a subclass of `converter.Converter`, or, where a tree of files says everything, of
`converter.TreeConverter`. It is found by its entry point in the group ``diffseg_nnunet.converters``, so that another
package can add its own; its command, ``diffseg convert NAME``, is made of what it says of itself.
"""
