"""The method of the paper, as small pure functions: objective, reward, noise, sampling, selection,
mixing. It may import `models`, for the types it computes with. It reads and writes no file.
"""
