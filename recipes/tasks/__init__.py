"""Tasks: what a recipe learns, and where its data comes from. One file each; importing this registers them all."""

from sma.recipes.tasks.contract import ClassificationTask, Samples, TaskData, TaskSpec
from sma.recipes.tasks.digits import DigitsTask
from sma.recipes.tasks.language import LanguageTask
from sma.recipes.tasks.listops import ListOpsTask
from sma.recipes.tasks.recall import RecallTask

__all__ = ["ClassificationTask", "DigitsTask", "LanguageTask", "ListOpsTask", "RecallTask", "Samples", "TaskData", "TaskSpec"]
