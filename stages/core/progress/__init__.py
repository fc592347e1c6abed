"""How far a run is and how long it takes yet, from the journal of its jobs; who is told of its end. It may
import `execution`.
"""
