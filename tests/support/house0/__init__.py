"""The transaction of `house-0` and its driver, which today's are compared with until the end of
issue 22.
"""
