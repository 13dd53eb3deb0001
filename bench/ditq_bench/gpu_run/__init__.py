"""What `bench/gpu_run.sh` runs beside the commands: open questions, small launches, the summary."""
