from pgl.model.config import GPTConfig
from pgl.model.gpt import GPT

__all__ = ["GPT", "GPTConfig"]
