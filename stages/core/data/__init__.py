"""What a person brings: label files in their layouts, prompts, texts, and what an import makes of them.
It may import `artifacts` and `execution`.
"""
