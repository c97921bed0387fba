"""What registers the accelerator, which stays in a process, is not looked through for doctests."""

collect_ignore = ["accelerator.py", "__main__.py"]
