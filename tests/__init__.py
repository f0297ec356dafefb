"""Tests of everything in this repository; a package, so that they can share their oracles."""
