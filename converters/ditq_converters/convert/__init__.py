"""A float model, its plan and its statistics -> a packed checkpoint. Open `story.py` first; it reads as it runs.

story.py               the whole, in memory or block by block from disk
block.py               one block: the stages below, one after another
site_data.py           what statistics and weights say about its sites
transforms.py          what the methods decide, within what the sites can take
fold.py                exact: transforms into producers and readers
recheck.py             whether the folds of a block are those that were proven, on its real weights
observed.py            behind the transforms: static ranges, error feedback, sampled rows
quantize.py            lossy: rounding; gptq.py, bias_correction.py, attention.py and groups.py are parts of it
pack.py                lossless: the packed model

Every stage reads entries of the plan and its own inputs, never the choices that made the plan.
"""
