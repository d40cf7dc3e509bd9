"""The sections of a report: functions of the run's record, empty where there is nothing to tell."""

from hfedmoe_ray.tracking.sections.experts import selection_map

__all__ = ["selection_map"]
