"""The second demo model: a small Flux trained by rectified flow, which takes prompts.

What comes in: the digits and a recipe (`training`), or the packaged weights. What goes out: a real
`FluxPipeline` (`pipeline`), as trained or with planted outlier channels (`salience`). Open `pipeline`
first.
"""
