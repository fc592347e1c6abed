"""What a person looks at in a browser while a server runs here, and the journal of what they decide. It may
import `execution`.
"""
