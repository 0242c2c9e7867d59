"""What everything else stands on: settings as pytrees, optimizers as the library runs them, traced
code.
"""
