"""The labelling page: images of prompts, pairs of them, what people answer, how far they agree, and the
table of labels. It may import `pages`, `policies`, `models`, `data`, `evaluation`, `artifacts` and
`execution`.
"""
