"""Models larger than memory: weights stay on disk, and a block is read when its turn comes.

source.py     a float transformer's safetensors, read a few tensors at a time
model.py      a model without weights that reads them as it runs
opening.py    whether to stream, and a pipeline around such a model
finished.py   converted blocks of an unfinished conversion
writer.py     a safetensors file written tensor by tensor
write.py      the packed folder, from converted blocks
"""
