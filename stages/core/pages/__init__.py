"""Pages that a person works with: the guarded server, its style, the journal of what was typed. It may
import `execution`.
"""
