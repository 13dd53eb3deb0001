"""What is wrong with statistics."""


class StatisticsError(ValueError):
    """Statistics are incomplete, damaged, or belong to another model or other settings."""
