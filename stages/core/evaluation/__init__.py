"""What is concluded from scores: statistics, guards, gates, verdicts, the paper's numbers. It may
import `artifacts`.
"""
