"""The tuner: launches to try, pruned without running, timed on a GPU, written as a launch table."""
