"""What stages exchange: schemas, tables, images, files that are written complete or not at all, and
how each was made. It may import `execution`.
"""
