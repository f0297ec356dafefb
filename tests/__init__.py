"""Tests of the whole repository. It is a package, so that test files can import shared helpers."""
