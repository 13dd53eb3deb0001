"""Every transformer class of the zoo through the converter: what is found, proven, stored, and what it costs.

    python -m ditq_bench.classes --work FOLDER --csv FILE --out FILE [NAME ...]

One row a class: sites and folds with the error of their proof, and for each recipe the share of the block linears'
parameters in integers and the relative error of one forward. A new process loads every checkpoint and must compute the
same bits, with a report that proves its integers. Start with `sweep.py`.
"""
