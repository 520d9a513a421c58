"""From a state and a request to the steps to take, in the running guest and in the definition.
Pure.
"""
