def print_summary(c): pass
