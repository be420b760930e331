"""The paper (arXiv 2512.01374) as pure functions of tensors; see README.md beside this file."""
