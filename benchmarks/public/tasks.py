"""All tasks by name, in the order of the table."""

from . import charts, documents, easy_vqa, emoji, fashion_mnist

TASKS = {module.TASK.name: module.TASK for module in (fashion_mnist, easy_vqa, charts, emoji, documents)}
