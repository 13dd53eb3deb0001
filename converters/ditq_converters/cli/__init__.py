"""The workshop's subcommands: inspect, calibrate, convert, demo."""
