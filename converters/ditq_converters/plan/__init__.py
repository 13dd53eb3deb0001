"""Sites + statistics + choices -> the plan: one entry per site, linear and attention; `convert` reads nothing else.

recipe.py      the choices, as keywords
make.py        choices -> plan: `make_plan`; sites.py, linears.py and attention.py decide about one entry each
plan.py        the plan, and how an entry is changed; entries.py its entries
file.py        the plan as a JSON file that a person reads and edits
check.py       a plan against a model, in sentences that name the entry
compact.py     the plan in a few lines, for config.json
coverage.py    how much of a model a plan covers
"""
