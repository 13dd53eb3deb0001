"""Calls of somebody's pipeline, as it is. What comes in: a pipeline or a transformer, and what to call it with.

inputs.py       the calls: as given, or made from short forms (prompts.py, labels.py); input_files.py: from a file
pipeline.py     makes them, with the pipeline's own scheduler or another (schedulers.py); nothing need be decoded
seeds.py        the noise of each, from counters
parts.py        the transformers inside
"""
