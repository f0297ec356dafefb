"""Tasks: what a recipe learns, and where its data comes from. One file each; importing this registers them all."""

from sma.recipes.tasks.contract import ClassificationTask, Samples, TaskData, TaskSpec
from sma.recipes.tasks.digits import DigitsTask
from sma.recipes.tasks.image import ImageTask
from sma.recipes.tasks.language import LanguageTask
from sma.recipes.tasks.listops import ListOpsTask
from sma.recipes.tasks.pathfinder import PathfinderTask, PathXTask
from sma.recipes.tasks.recall import RecallTask
from sma.recipes.tasks.retrieval import RetrievalTask
from sma.recipes.tasks.speech import SpeechTask
from sma.recipes.tasks.text import TextTask

__all__ = [
    "ClassificationTask",
    "DigitsTask",
    "ImageTask",
    "LanguageTask",
    "ListOpsTask",
    "PathXTask",
    "PathfinderTask",
    "RecallTask",
    "RetrievalTask",
    "Samples",
    "SpeechTask",
    "TaskData",
    "TaskSpec",
    "TextTask",
]
