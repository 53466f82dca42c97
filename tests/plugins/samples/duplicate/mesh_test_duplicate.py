"""Comes in under an entry point name that another distribution has. Must not be imported."""

raise AssertionError("this module was imported")
