"""Data sets for multi-task networks, and the module that turns their rows into one vector."""

from python_models.data.census import CensusEncoder, CensusFileError, load_census, read_census
from python_models.data.features import TableFeatures, TableModel
from python_models.data.synthetic import SyntheticTasks, make_synthetic
from python_models.data.task_data import Splits, TaskData, split_rows

__all__ = [
    "CensusEncoder",
    "CensusFileError",
    "Splits",
    "SyntheticTasks",
    "TableFeatures",
    "TableModel",
    "TaskData",
    "load_census",
    "make_synthetic",
    "read_census",
    "split_rows",
]
