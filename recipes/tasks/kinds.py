"""All tasks of the recipes; an import of this file registers their kinds."""

from sma.recipes.tasks import digits, image, mqar, recall, retrieval, text
from sma.recipes.tasks.language import task as language
from sma.recipes.tasks.listops import task as listops
from sma.recipes.tasks.pathfinder import task as pathfinder
from sma.recipes.tasks.speech import task as speech

__all__ = ["digits", "image", "language", "listops", "mqar", "pathfinder", "recall", "retrieval", "speech", "text"]
