"""Fuzzers of every reader: python -m tests.fuzz.run --help"""
