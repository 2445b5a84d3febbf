"""Fine-tune MiniCPM-V with LoRA: a Kubeflow pipeline that also runs whole on a laptop."""

from .moved_modules import follow_old_names

follow_old_names()
