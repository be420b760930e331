"""`keel init`: from a file of prompts and a model folder to a job file, every choice with a reason.

look (data, model) -> choose -> write
"""
