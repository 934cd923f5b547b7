"""What a script of one's own needs to load prompts as `trl-crisp train` does: the public names of rows/."""

from trl_crisp.rows.arguments import CRISPScriptArguments
from trl_crisp.rows.prompts import load_prompts

__all__ = ["CRISPScriptArguments", "load_prompts"]
