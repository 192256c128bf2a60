"""What is compiled ahead of time, a file an operator: `usual(target)`, the few of every run, and `rest(target)`."""
